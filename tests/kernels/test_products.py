"""Attention as matrix products against the plain formula, in value and gradient, and inside whole models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retrofit.errors import UserError
from retrofit.kernels import attention_interface, products
from retrofit.kernels.registry import KernelChoice, using
from tests.tiny import tiny_model

PRODUCTS = KernelChoice("auto", "products", "test")
FORWARD = attention_interface.attention_function("products", products.attention)


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
    ("family", "over"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("mistral", {"sliding_window": 9}),
        # One sliding layer and one that sees all; the class makes the sliding mask and does not tell the layer.
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ],
)
def test_whole_models_give_the_logits_and_gradients_of_eager(family: str, over: dict[str, int]) -> None:
    model = tiny_model(family, **over)
    ids = torch.arange(40)[None]
    parameters = list(model.parameters())
    expected = model(ids, labels=ids, use_cache=False)
    expected_grads = torch.autograd.grad(expected.loss, parameters)
    with using(model, PRODUCTS):
        found = model(ids, labels=ids, use_cache=False)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
        for got, want in zip(torch.autograd.grad(found.loss, parameters), expected_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_the_mask_goes_before_the_window_of_the_layer() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 20, 8, generator=generator) for _ in range(3))
    for mask, layer, window in ((torch.tensor(5), None, 5), (torch.tensor(0), 5, None), (None, 5, 5)):
        out, _ = FORWARD(nn.Module(), q, k, v, mask, scaling=0.3, sliding_window=layer)
        torch.testing.assert_close(out.transpose(1, 2), plain(q, k, v, 0.3, window))


def test_refuses_what_it_cannot_express() -> None:
    model, ids = tiny_model("llama"), torch.arange(40)[None]
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with torch.no_grad(), using(model, PRODUCTS), pytest.raises(UserError, match="padding"):
        model(ids, attention_mask=padded, use_cache=False)
    q = torch.zeros(1, 1, 4, 8)
    for mask, refused in (
        (torch.zeros(1, 1, 4, 4), {}),
        (torch.tensor(-1), {}),
        (None, {"dropout": 0.1}),
        (None, {"softcap": 1.0}),
        (None, {"position_bias": q}),
        (None, {"is_causal": False}),
    ):
        with pytest.raises(UserError, match="products kernel cannot express"):
            FORWARD(nn.Module(), q, q, q, mask, **refused)
