"""A kernel is held against eager attention on the model itself, and a proof can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from retrofit.kernels import blockwise
from retrofit.kernels.check import TOLERANCE, _moved, prove
from retrofit.kernels.registry import KernelChoice, choose
from retrofit.model.families import describe
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize(
    ("family", "kernel"), [("llama", "blockwise"), ("gemma3_text", "blockwise"), ("qwen3", "sdpa")]
)
def test_a_right_kernel_is_proven(family: str, kernel: str) -> None:
    model = tiny_model(family)
    proof = prove(model, choose(kernel, describe(model.config), "cpu"), torch.arange(60)[None])
    assert proof.passed
    assert 0 < proof.max_difference < proof.tolerance
    assert proof.tokens == 60
    assert model.config._attn_implementation == "eager"


def test_a_model_that_amplifies_rounding_is_held_against_its_own() -> None:
    """Queries a thousand times as large make attention a choice of one key, which rounding may turn."""
    model, ids = tiny_model("llama"), torch.arange(60)[None]
    choice = KernelChoice("blockwise", "blockwise", "test")
    usual = prove(model, choice, ids)
    assert 0 < usual.rounding < 1e-4
    assert usual.tolerance == TOLERANCE["float32"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 1000
        model.lm_head.weight *= 1000
    sharp = prove(model, choice, ids)
    assert sharp.tolerance == pytest.approx(4 * sharp.rounding, rel=0.01)
    assert sharp.tolerance > 10 * TOLERANCE["float32"]
    assert sharp.passed


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_that_do_not_move_give_the_logits_of_the_ids(family: str) -> None:
    model, ids = tiny_model(family), torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(_moved(model, ids, 0.0), model(input_ids=ids, use_cache=False).logits)


def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-left causal alignment is right for a whole sequence and wrong for a cached chunk only."""

    def top_left(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *_: Any) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(blockwise, "attention", top_left)
    model = tiny_model("llama")
    assert not prove(model, KernelChoice("blockwise", "blockwise", "test"), torch.arange(60)[None]).passed


@pytest.mark.parametrize("broken", ["whole", "chunk"])
def test_a_kernel_that_gives_nan_is_not_proven(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = blockwise.attention

    def attention(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        chunk = q.shape[2] < k.shape[2]
        return right(q, k, *rest) * (torch.nan if chunk == (broken == "chunk") else 1.0)

    monkeypatch.setattr(blockwise, "attention", attention)
    proof = prove(tiny_model("llama"), KernelChoice("blockwise", "blockwise", "test"), torch.arange(60)[None])
    assert not proof.passed
    assert proof.max_difference != proof.max_difference
