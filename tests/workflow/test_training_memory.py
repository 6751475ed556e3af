"""The memory of training: the formula beside what autograd really keeps, and beside measured peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.kernels import registry
from retrofit.model.families import describe
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Adapter, Recover
from retrofit.recovery.student_teacher import StudentTeacher, autocast
from retrofit.recovery.train import student_with_adapters
from retrofit.workflow.estimate.training_memory import trained_parameters, training_memory
from tests.tiny import tiny_config

TOKENS = 192
WIDTHS = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}


def student(family: str, layers: int, recipe: Recover, value: int = 4) -> tuple[torch.nn.Module, AttentionSpec]:
    """A tiny random model with adapters, as recovery trains it."""
    config = tiny_config(family, num_hidden_layers=layers, **WIDTHS)
    spec, dtype = describe(config), torch.float32 if value == 4 else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    kernel = "sdpa" if value == 4 else "products"  # what is chosen on a CPU, without and with bfloat16 of its own
    registry.apply(model, registry.KernelChoice("auto", kernel, "as recovery chooses it"))
    return student_with_adapters(StudentTeacher(model, None, spec, kernel, "", 0), recipe, seed=0), spec


def kept(family: str, layers: int, recipe: Recover, value: int) -> tuple[int, int]:
    """Bytes that autograd keeps of one forward pass, every storage once and no weights; and what the plan says."""
    model, spec = student(family, layers, recipe, value)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}  # the tensors too, so that no storage is given away again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids_1T = torch.arange(TOKENS)[None]
    dtype = torch.float32 if value == 4 else torch.bfloat16
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(ids_1T.device, dtype):
        model(input_ids=ids_1T)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    return counted, training_memory(spec, spec, 0, recipe, value).kept


@pytest.mark.parametrize("value", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("llama", {}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"adapter": Adapter(rank=8, mlp=False)}),
        ("llama", {"adapter": Adapter(rank=8, attention=False)}),
        ("qwen3", {}),
        ("phi3", {}),
        ("starcoder2", {}),
        ("starcoder2", {"gradient_checkpointing": True}),
        ("phi", {}),
        ("mixtral", {}),
    ],
)
def test_a_layer_keeps_what_the_plan_says(family: str, over: dict[str, object], value: int) -> None:
    recipe = Recover.model_validate(
        {"adapter": Adapter(rank=8), "sequence_length": TOKENS, "gradient_checkpointing": False, **over}
    )
    # The difference of two depths: what is kept once, and in the first layer, is no layer's.
    (two, two_planned), (three, three_planned) = (kept(family, layers, recipe, value) for layers in (2, 3))
    assert three_planned - two_planned == pytest.approx(three - two, rel=0.12 if family in ("phi3", "mixtral") else 0.1)


@pytest.mark.parametrize("family", ["llama", "starcoder2", "phi3", "qwen2_moe", "gpt_bigcode"])
@pytest.mark.parametrize("over", [{}, {"mlp": False}, {"embeddings": True}])
def test_adapters_are_counted(family: str, over: dict[str, bool]) -> None:
    adapter = Adapter(rank=8, **over)  # type: ignore[arg-type]
    model, spec = student(family, 2, Recover(adapter=adapter))
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_parameters(spec, adapter) == pytest.approx(counted, rel=0.1)


def test_what_depends_on_what() -> None:
    spec = describe(tiny_config("llama"))
    recipe = Recover(sequence_length=1024)

    def memory(value: int = 4, **over: object) -> int:
        changed = Recover.model_validate({**recipe.model_dump(), **over})
        return training_memory(spec, spec, 100_000, changed, value).total

    assert memory(2) < memory()
    assert memory(loss="lm") < memory()
    assert memory(gradient_checkpointing=True) < memory()
    assert memory(sequence_length=512, batch_size=2) == memory()
    fewer = replace(spec, layers=tuple(replace(layer, kv_heads=1) for layer in spec.layers))
    assert training_memory(fewer, spec, 100_000, recipe, 4).total < memory()
