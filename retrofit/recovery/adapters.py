"""LoRA adapters by peft: where they sit, what else is trained, and how they are merged back into a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from retrofit.checkpoint.rewrite import Rewritten, rewrite
from retrofit.checkpoint.side_files import copy_side_files
from retrofit.context.names import portable
from retrofit.errors import UserError
from retrofit.model.completeness import leftovers, tied_copy
from retrofit.model.families.experts import EXPERTS
from retrofit.model.folder import ModelFolder, opened
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Adapter
from retrofit.recovery.fused import fuse

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from retrofit.console import Progress

RATE_BY_WIDTH = 0.576
WINDOWS_SHARE = 0.2
SINKS = "sinks.safetensors"
"""Beside a kept adapter: the trained attention sinks."""


def attach(model: PreTrainedModel, adapter: Adapter, spec: AttentionSpec, seed: int) -> PeftModel:
    """The model with trainable adapters in float32; everything else is frozen in its own dtype.

    LoRA (Hu et al. 2021, arXiv:2106.09685) on the projections that `adapter` names; B starts at zero, so that the
    model's outputs are the same as before. Norms and embeddings, where asked for, are trained in full, in float32, and
    so are attention sinks: peft wraps modules alone, and a sink is a parameter of the attention's own.
    """
    from peft import LoraConfig, get_peft_model

    targets = target_modules(model, adapter, spec)
    full = full_modules(model, adapter)
    if not targets:
        raise UserError(
            "the adapter sits nowhere", where="recover.adapter", fix="set attention: true or mlp: true (or both)"
        )
    model.requires_grad_(False)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        modules_to_save=full or None,
        bias="none",
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        torch.manual_seed(seed)
        # `head_of` and the merge take care of a tied head, which peft warns about.
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        peft_model = cast("PeftModel", get_peft_model(cast(Any, model), config))
    for name in sinks(adapter, spec):
        cast(nn.Module, peft_model.base_model.model).get_parameter(name).requires_grad_(True)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse(peft_model)
    return peft_model


def default_rate(student: AttentionSpec, teacher: AttentionSpec | None) -> float:
    """Adam's learning rate for adapters where a recipe names none: RATE_BY_WIDTH / width, 1e-3 for 576 channels.

    It is a fifth of that where sliding windows are all that tells the student from its teacher.

    It falls as 1 / width like that of hidden weights in Yang et al. 2022 (arXiv:2203.03466). The constant was measured
    on SmolLM2-135M with converted heads, where a third of it recovers far less in as many steps; the fifth on the same
    model with windows, which lose so little that the whole of it makes them worse (docs/windows.md).
    """
    rate = RATE_BY_WIDTH / student.hidden_size
    return WINDOWS_SHARE * rate if teacher is not None and _windows_alone(student, teacher) else rate


def _windows_alone(student: AttentionSpec, teacher: AttentionSpec) -> bool:
    specs = student, teacher
    heads, other_heads = ([layer.kv_heads for layer in spec.layers] for spec in specs)
    windows, other_windows = ([layer.window for layer in spec.layers] for spec in specs)
    same_length = student.max_position_embeddings == teacher.max_position_embeddings
    return same_length and heads == other_heads and windows != other_windows


def target_modules(model: nn.Module, adapter: Adapter, spec: AttentionSpec) -> list[str]:
    """Module names of the projections that carry LoRA: the spec's q/k/v/o, and every other linear of a layer (MLP)."""
    names: set[str] = set()
    if adapter.attention:
        slots = (slot for layer in spec.layers for slot in (layer.q, layer.k, layer.v, layer.o))
        names |= {slot.name.removesuffix(".weight") for slot in slots}
    if adapter.mlp:
        for layer in spec.layers:
            root = f"{spec.layers_path}.{layer.index}."
            attention = f"{root}{spec.attention_path}."
            names |= {
                name
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and name.startswith(root) and not name.startswith(attention)
            }
    return sorted(names)


def about_experts(adapter: Adapter, spec: AttentionSpec) -> tuple[str, ...]:
    """A note on what of the MLPs carries no adapter although it is asked for; () where all of it does.

    The class stacks experts in one parameter and no linear modules; peft's adapters on parameters would have to be
    merged expert by expert into a checkpoint that stores them apart.
    """
    if not adapter.mlp or spec.family not in EXPERTS:
        return ()
    return ("the experts carry no adapters (adapter.mlp): attention, and linear layers outside the experts, do",)


def full_modules(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Module names that are trained in full. A tied head is the input embedding itself and is not named."""
    names: list[str] = []
    if adapter.norms:
        names += [name for name, module in model.named_modules() if _is_norm(module)]
    if adapter.embeddings:
        wanted = [module for module in model.modules() if isinstance(module, nn.Embedding)]  # of positions as well
        if not model.config.tie_word_embeddings:
            wanted.append(model.get_output_embeddings())
        names += [name for name, module in model.named_modules() if any(module is other for other in wanted)]
    return names


def sinks(adapter: Adapter, spec: AttentionSpec) -> list[str]:
    """Names of the attention sinks that are trained. Those that stand for none, far below every score, have no gradient
    and stay as they are."""
    return [layer.sinks for layer in spec.layers if layer.sinks is not None] if adapter.sinks else []


def trainable(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """A copy in host memory of everything that is trained, by name: whole tensors, also where processes hold parts.

    All processes that hold parts have to call it; those with keep=False get nothing.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter.detach())
            if keep:
                weights[name] = value.to("cpu", copy=True)
    return weights


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is split over processes, which all of them have to ask for."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def changed_weights(peft_model: PeftModel, weights: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """{checkpoint name: function from the stored tensor to the trained one, in float32}. weights: of `trainable`."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    inner, prefix = cast(nn.Module, peft_model.base_model.model), _prefix(peft_model)
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer):
            adapter = cast(Any, module).active_adapters[0]
            a_RI, b_OR = (weights[f"{prefix}.{name}.lora_{x}.{adapter}.weight"] for x in "AB")
            changes[f"{name}.weight"] = _add_delta(a_RI, b_OR, cast(Any, module).scaling[adapter])
        elif isinstance(module, ModulesToSaveWrapper):
            adapter = module.active_adapters[0]
            for key, _ in module.modules_to_save[adapter].named_parameters():
                changes[f"{name}.{key}"] = _replace(weights[f"{prefix}.{name}.modules_to_save.{adapter}.{key}"])
    return changes | {name: _replace(value) for name, value in _outside_peft(prefix, weights).items()}


def merge_and_save(
    peft_model: PeftModel,
    source: str | Path | ModelFolder,
    out: str | Path,
    weights: Mapping[str, Tensor],
    *,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> Rewritten:
    """Write the checkpoint `source` with the trained weights merged into the existing folder `out`.

    W + s B A is formed in float32 and rounded once to the stored dtype, tensor by tensor from the files; tensors
    without an adapter are copied as bytes. Names, dtypes, configuration and tokenizer are the source's, the last two
    under the names that other releases and engines look for as well.
    """
    folder = opened(source)
    checkpoint = folder.checkpoint
    changes = changed_weights(peft_model, weights)
    copy = tied_copy(checkpoint, folder.config)
    if copy and copy[1] in changes:
        changes[copy[0]] = changes[copy[1]]  # the head is stored as well, and stays what it is tied to
    missing = sorted(changes.keys() - set(checkpoint.names))
    assert not missing, f"trained tensors that the checkpoint does not hold: {missing}"

    def rule(name: str, stored: Tensor) -> Iterable[tuple[str, Tensor]]:
        return [(name, changes[name](stored))]

    written = rewrite(
        checkpoint,
        out,
        {**dict.fromkeys(changes, rule), **dict.fromkeys(leftovers(checkpoint, str(checkpoint.config["model_type"])))},
        config=portable(checkpoint.config),
        max_shard_size=max_shard_size,
        progress=progress,
    )
    copy_side_files(folder.path, out)
    return written


def save_adapter(peft_model: PeftModel, out: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Write the adapter into the existing folder `out`, for `PeftModel.from_pretrained(student, out)`.

    What is trained in full is part of it, but for sinks, which no adapter of peft's holds: they stand in SINKS, by the
    names that the student has for them. It names no base model: that lies on this machine, under a path of its own.
    """
    for config in peft_model.peft_config.values():
        config.base_model_name_or_path = ""
    peft_model.save_pretrained(str(out), save_embedding_layers=False, state_dict=dict(weights))
    (Path(out) / "README.md").unlink(missing_ok=True)  # a form to fill in
    if own := _outside_peft(_prefix(peft_model), weights):
        save_file(own, Path(out) / SINKS)


def _prefix(peft_model: PeftModel) -> str:
    """What stands before the names of the model that adapters sit in."""
    return next(name for name, module in peft_model.named_modules() if module is peft_model.base_model.model)


def _outside_peft(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is trained in the place of the model's own, by its name in the checkpoint: sinks."""
    parts = (".lora_", ".modules_to_save.")
    return {
        name.removeprefix(f"{prefix}."): value for name, value in weights.items() if not any(p in name for p in parts)
    }


def _add_delta(a_RI: Tensor, b_OR: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    return lambda stored: stored.float() + scale * (b_OR.float().cpu() @ a_RI.float().cpu())


def _replace(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda stored: value.float().cpu().reshape(stored.shape)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))
