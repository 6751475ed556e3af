"""Adapters start as the identity, train what was asked for, and merge into exactly the tensors they sit on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.context.names import portable
from retrofit.model.families import describe
from retrofit.recipe.schema import Adapter
from retrofit.recovery.adapters import about_experts, attach, merge_and_save, target_modules, trainable
from retrofit.recovery.fused import fuse
from retrofit.recovery.student_teacher import head_of, load_student_teacher
from tests.tiny import FAMILIES, save_tiny, tiny_model

IDS = torch.arange(3, 20)[None]


def noise(model: torch.nn.Module, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        before = model(IDS).logits
        peft_model = attach(model, Adapter(rank=4), describe(model.config), seed=0)
        assert torch.equal(peft_model(IDS).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full", [False, True])
def test_merged_weights_are_the_adapted_model(family: str, full: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    adapter = Adapter(rank=4, norms=full)
    peft_model = attach(model, adapter, describe(model.config), seed=0)
    noise(peft_model)
    out = tmp_path / "out"
    out.mkdir()
    merge_and_save(peft_model, source, out, trainable(peft_model))
    merged = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        expected = peft_model(IDS).logits
        assert (merged(IDS).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    assert set(before.names) == set(after.names)
    assert after.config == portable(before.config)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    changed = {name for name in before.names if not torch.equal(before.tensor(name), after.tensor(name))}
    assert {name for name in changed if "norm" in name} == {n for n in before.names if "norm" in n and full}
    assert not any("embed" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize(("tied", "stored"), [(False, True), (True, False), (True, True)])
def test_trained_embeddings_are_merged_and_a_tied_head_follows(tied: bool, stored: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=tied)
    if tied and stored:
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    peft_model = attach(model, Adapter(rank=4, embeddings=True), describe(model.config), seed=0)
    noise(peft_model)
    head = head_of(model).weight
    assert head.requires_grad
    assert (head is model.get_input_embeddings().modules_to_save["default"].weight) == tied
    out = tmp_path / "out"
    out.mkdir()
    merge_and_save(peft_model, source, out, trainable(peft_model))
    assert Checkpoint.open(out).names == Checkpoint.open(source).names
    merged = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state @ head.T
        assert (merged(IDS).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_learned_positions_are_trained_with_the_embeddings(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt_bigcode")
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    peft_model = attach(model, Adapter(rank=4, embeddings=True), describe(model.config), seed=0)
    noise(peft_model)
    out = tmp_path / "out"
    out.mkdir()
    merge_and_save(peft_model, source, out, trainable(peft_model))
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    assert not torch.equal(before.tensor("transformer.wpe.weight"), after.tensor("transformer.wpe.weight"))
    assert not torch.equal(before.tensor("transformer.wte.weight"), after.tensor("transformer.wte.weight"))


def test_the_merge_rounds_once_to_the_stored_dtype(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    peft_model = attach(model, Adapter(rank=4, alpha=8), describe(model.config), seed=0)
    noise(peft_model)
    out = tmp_path / "out"
    out.mkdir()
    merge_and_save(peft_model, source, out, trainable(peft_model))
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    delta = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    stored = Checkpoint.open(source).tensor(f"{name}.weight").float()
    merged = Checkpoint.open(out).tensor(f"{name}.weight")
    assert torch.equal(merged, (stored + delta).to(torch.bfloat16))
    assert not torch.equal(merged.float(), stored)


def test_which_projections_carry_adapters() -> None:
    model = tiny_model("llama")
    spec = describe(model.config)
    attention = target_modules(model, Adapter(mlp=False), spec)
    mlp = target_modules(model, Adapter(attention=False), spec)
    assert {name.split(".")[-1] for name in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[-1] for name in mlp} == {"gate_proj", "up_proj", "down_proj"}
    assert len(attention) == 8
    assert len(mlp) == 6
    with pytest.raises(ValidationError, match="sits nowhere"):
        Adapter(attention=False, mlp=False)


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_generator_alone() -> None:
    models = [tiny_model("llama") for _ in range(3)]
    state = torch.random.get_rng_state()
    first, second, other = (
        {n: p for n, p in attach(m, Adapter(rank=4), describe(m.config), seed).named_parameters() if "lora_A" in n}
        for m, seed in zip(models, (1, 1, 2), strict=True)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_fused_forward_is_pefts_forward() -> None:
    results = []
    for fused in (False, True):
        model = tiny_model("qwen2").double()
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"])
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
        noise(peft_model)
        if fused:
            assert fuse(peft_model) == 6
        logits = peft_model(IDS).logits
        logits.square().sum().backward()
        results.append([logits] + [p.grad for p in peft_model.parameters() if p.requires_grad])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_dropout_keeps_pefts_forward() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"]))
    assert fuse(model) == 0


def test_the_teacher_shares_what_is_equal(tmp_path: Path) -> None:
    teacher_folder = save_tiny(tmp_path / "teacher", "llama")
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "student")
    pair = load_student_teacher(tmp_path / "student", teacher_folder, device="cpu", dtype=torch.float32, kernel="sdpa")
    assert pair.teacher is not None
    mine = dict(pair.student.named_parameters())
    for name, parameter in pair.teacher.named_parameters():
        assert (parameter.data_ptr() == mine[name].data_ptr()) == ("v_proj" not in name), name
        assert not parameter.requires_grad
    own = sum(p.nbytes for n, p in pair.teacher.named_parameters() if "v_proj" in n)
    assert pair.shared_bytes == sum(p.nbytes for p in pair.teacher.parameters()) - own
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(teacher_folder)
        assert torch.equal(pair.teacher(IDS).logits, original(IDS).logits)
        # Training the student's adapters does not move the teacher.
        noise(attach(pair.student, Adapter(rank=2), pair.spec, 0))
        assert torch.equal(pair.teacher(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_without_adapters_are_told_of(family: str) -> None:
    model = tiny_model(family)
    spec = describe(model.config)
    stacked = [name for name, p in model.named_parameters() if p.dim() == 3]
    targets = target_modules(model, Adapter(), spec)
    assert not any(".experts" in name for name in targets)
    assert bool(about_experts(Adapter(), spec)) == bool(stacked)
    assert about_experts(Adapter(mlp=False), spec) == ()
