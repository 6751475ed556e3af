"""Attention as matrix products against the plain formula, in value and gradient, and inside whole models."""

from __future__ import annotations

import pytest
import torch

from retrofit.errors import UserError
from retrofit.kernels import products
from retrofit.model.families import describe
from retrofit.recover.pair import compute_dtype, training_kernel
from tests.tiny import tiny_model


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:  # [B, H, T, D]
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (distance >= 0) & (distance < (window or tokens))
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_value_and_gradient(window: int | None, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ROWS", 48)
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(2, n, 50, 8, generator=generator, dtype=torch.float64) for n in (heads, kv_heads, kv_heads, heads)
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    expected, actual = plain(q, k, v, 0.3, window), products.attention(q, k, v, 0.3, window)
    torch.testing.assert_close(actual, expected)
    for got, want in zip(
        torch.autograd.grad(actual, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # dk and dv are summed in float32


@pytest.mark.parametrize(
    ("family", "over"), [("llama", {"num_key_value_heads": 2}), ("mistral", {"sliding_window": 9})]
)
def test_whole_models_give_the_logits_of_eager(family: str, over: dict[str, int]) -> None:
    model = tiny_model(family, **over)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        products.register()
        model.set_attn_implementation(products.NAME)
        assert (model(ids, use_cache=False).logits - expected).abs().max() < 1e-4
        padded = torch.ones_like(ids)
        padded[0, :5] = 0
        with pytest.raises(UserError, match="padding"):
            model(ids, attention_mask=padded, use_cache=False)


def test_auto_takes_it_where_it_helps_only() -> None:
    llama, gemma2 = (describe(tiny_model(family).config) for family in ("llama", "gemma2"))
    assert training_kernel("auto", llama, "cpu", "bfloat16").name == products.NAME
    assert training_kernel("auto", llama, "cpu", "float32").name != products.NAME
    assert training_kernel("auto", gemma2, "cpu", "bfloat16").name == "eager"
    assert training_kernel("sdpa", llama, "cpu", "bfloat16").name == "sdpa"


def test_the_compute_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert compute_dtype("cpu") == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True})
    assert compute_dtype("cpu") == torch.float32
    assert compute_dtype("cpu", "bfloat16") == torch.bfloat16
    with pytest.raises(UserError, match="float16"):
        compute_dtype("cpu", "float16")
