"""Learned positions get a longer table by linear interpolation; everything else stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.context import rope
from retrofit.context.learned import TABLES, interpolate
from retrofit.errors import UserError
from retrofit.recipe.schema import RopeSettings
from tests.tiny import randomise, save_tiny, tiny_config

LONG = 80


def saved(folder: Path, family: str) -> Path:
    if family == "gpt_bigcode":
        return save_tiny(folder, family, max_position_embeddings=32)
    sizes = {"vocab_size": 60, "num_attention_heads": 2}
    model = (
        GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, vocab_size=60))
        if family == "gpt2"
        else OPTForCausalLM(
            OPTConfig(
                max_position_embeddings=32,
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=1,
                word_embed_proj_dim=16,
                **sizes,
            )
        )
    )
    randomise(model)
    model.save_pretrained(folder)
    return folder


def table_of(model) -> np.ndarray:
    name = TABLES[model.config.model_type].names[0].removesuffix(".weight")
    return model.get_submodule(name).weight.detach().double().numpy()


@pytest.mark.parametrize("family", sorted(TABLES))
def test_the_new_table_is_the_old_one_interpolated(tmp_path: Path, family: str) -> None:
    source, offset = saved(tmp_path / "source", family), TABLES[family].offset
    done = rope.write_extended(source, tmp_path / "out", length=LONG, method="linear")
    assert (done.original, done.length, done.factor) == (32, LONG, 2.5)
    assert "interpolated to 80" in done.notes[0]
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "out"))
    assert after.config.max_position_embeddings == LONG
    old, new = table_of(before), table_of(after)
    assert new.shape == (LONG + offset, old.shape[1])
    np.testing.assert_array_equal(new[:offset], old[:offset])
    at = np.linspace(0, 31, LONG)
    for column in range(old.shape[1]):
        np.testing.assert_allclose(new[offset:, column], np.interp(at, np.arange(32), old[offset:, column]), atol=1e-6)
    ids = torch.arange(LONG)[None] % 50
    with torch.no_grad():
        assert torch.isfinite(after(ids).logits).all()
        # The first position reads the same row as before.
        assert torch.allclose(after(ids[:, :1]).logits, before(ids[:, :1]).logits, atol=1e-6)
        assert not torch.allclose(after(ids[:, :9]).logits, before(ids[:, :9]).logits, atol=1e-3)
    kept = set(Checkpoint.open(source).names) - set(TABLES[family].names)
    for name in kept:
        assert torch.equal(Checkpoint.open(source).tensor(name), Checkpoint.open(tmp_path / "out").tensor(name))


def test_the_same_length_is_the_same_table() -> None:
    table_NC = torch.randn(9, 4)
    assert torch.equal(interpolate(table_NC, 7, offset=2), table_NC)
    assert torch.equal(interpolate(table_NC[:1], 3), table_NC[:1].expand(3, -1))


@pytest.mark.parametrize(
    ("method", "settings", "what"),
    [("yarn", RopeSettings(), "learned positions"), ("linear", RopeSettings(scale=2.0), "mean nothing")],
)
def test_what_a_table_cannot_do_is_refused_with_what_it_can(method: str, settings: RopeSettings, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        rope.plan(tiny_config("gpt_bigcode"), factor=2.0, method=method, settings=settings)
    assert "method: linear" in str(error.value.fix)
    assert not rope.lint(tiny_config("gpt_bigcode"))


def test_a_table_that_is_missing_or_of_another_length(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gpt2")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "n_positions": 31}))
    with pytest.raises(UserError, match="32 positions"):
        rope.write_extended(source, tmp_path / "out", length=LONG, method="linear")
    (source / "config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "wpe" not in k}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="no table"):
        rope.write_extended(source, tmp_path / "out", length=LONG, method="linear")
    assert not (tmp_path / "out").exists()


def test_causal_masks_that_old_checkpoints_store_are_left_out(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gpt2")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    rope.write_extended(source, tmp_path / "out", length=LONG, method="linear")
    assert not any(name.endswith(".attn.bias") for name in Checkpoint.open(tmp_path / "out").names)
