"""Attention sinks in our kernels against a plain softmax with one more column, and against eager on whole models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels import attention_interface, blockwise, products, tile_choice
from retrofit.kernels import ring as ring_module
from retrofit.kernels.placement import zigzag
from retrofit.kernels.ring_group import Ring
from retrofit.kernels.sinks import sink_gradient, with_sinks
from retrofit.kernels.tile_backends import TileBackend
from retrofit.kernels.tile_choice import TileChoice
from retrofit.system.world import World
from tests.kernels.test_blockwise import SHAPES, random_qkv, visible
from tests.pretend_gpu import OnGpu, pretend_gpu
from tests.ranks import on_ranks

SCALE = 0.3
WINDOWS = [None, 1, 5, 16, 100]
SINKS = torch.tensor([-1.0, 0.5, 3.0, -4.0, 0.0, 1.5], dtype=torch.float64)  # of 6 query heads
OFF = torch.full((6,), -1e4, dtype=torch.float64)


def reference(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, window: int | None) -> Tensor:
    """softmax over the visible scores and the sink, whose column is then dropped."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT * SCALE).masked_fill(~visible(q.shape[2], k.shape[2], window), -math.inf)
    column = sinks_H[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def with_gradients(attention: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The out of `attention(*inputs)` and its gradients for one upstream gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*inputs)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def require_close(found: list[Tensor], expected: list[Tensor], atol: float = 5e-6) -> None:
    # The CPU op's exponential is good to 4e-7, in double precision too.
    for name, ours, theirs in zip(("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=atol * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blockwise_equals_a_softmax_with_one_more_column(
    shape: tuple[int, int], window: int | None, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wide: as on a GPU, where equal tiles are computed at once."""
    monkeypatch.setattr(blockwise, "many_at_once", lambda q: wide)
    inputs = [*random_qkv(*shape), SINKS]
    found = with_gradients(lambda q, k, v, b: blockwise.attention(q, k, v, SCALE, window, b), inputs)
    expected = with_gradients(lambda q, k, v, b: reference(q, k, v, b, window), inputs)
    require_close(found, expected)
    with torch.no_grad():
        plain = blockwise.attention(*inputs[:3], SCALE, window, SINKS)
    torch.testing.assert_close(plain, found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
def test_products_equal_a_softmax_with_one_more_column(
    heads: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "ROWS", 48)
    inputs = [*random_qkv(50, 50, heads=heads[0], kv_heads=heads[1]), SINKS]
    found = with_gradients(lambda q, k, v, b: products.attention(q, k, v, SCALE, window, b), inputs)
    require_close(found, with_gradients(lambda q, k, v, b: reference(q, k, v, b, window), inputs))


def test_products_in_bfloat16_are_as_good_as_without_sinks() -> None:
    """Relative error of out and gradients to the exact result of the same bfloat16 inputs."""
    inputs = [x.bfloat16() for x in (*random_qkv(300, 300), SINKS)]
    exact = with_gradients(lambda q, k, v, b: reference(q, k, v, b, 40), [x.double() for x in inputs])
    found = with_gradients(lambda q, k, v, b: products.attention(q, k, v, SCALE, 40, b), inputs)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    assert max(errors) < 0.012, errors


def test_the_gradient_of_a_sink_is_that_of_the_scale_it_puts_on_each_query() -> None:
    """-sum_i (dO_i . o_i) p_i (1 - p_i), p_i = sigmoid(lse_i - b), o_i the out without sinks."""
    generator = torch.Generator().manual_seed(3)
    out, grad = (torch.randn(2, 6, 9, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    lse = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    share = torch.sigmoid(lse - SINKS[:, None])
    expected = -((grad * out).sum(-1) * share * (1 - share)).sum((0, 2))
    torch.testing.assert_close(sink_gradient(grad, *with_sinks(out, lse, SINKS), SINKS), expected)


def test_a_sink_far_below_zero_changes_nothing() -> None:
    q, k, v = random_qkv(33, 40)
    for window in WINDOWS:
        torch.testing.assert_close(
            blockwise.attention(q, k, v, SCALE, window, OFF),
            blockwise.attention(q, k, v, SCALE, window),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("value", [1e4, -math.inf])
def test_extreme_sinks_are_finite(value: float) -> None:
    inputs = [*random_qkv(20, 33, dtype=torch.float32), torch.full((6,), value)]
    found = with_gradients(lambda q, k, v, b: blockwise.attention(q, k, v, SCALE, 7, b), inputs)
    assert all(bool(torch.isfinite(x).all()) for x in found)
    if value > 0:
        assert float(found[0].abs().max()) == 0


def test_sinks_of_another_shape_are_refused() -> None:
    forward = attention_interface.attention_function("blockwise", blockwise.attention)
    q, k, v = random_qkv(4, 4)
    with pytest.raises(UserError, match=r"cannot express sinks \(5,\)"):
        forward(torch.nn.Module(), q, k, v, None, s_aux=SINKS[:5])


# ------------------------------------------------------------------------------------------------- tiles of a GPU


def on_the_cpu() -> TileChoice:
    """A choice whose kernel computes what pretended GPU tensors hold."""
    aten = torch.ops.aten

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (grad, q, k, v, out, lse)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=scale)

    backend = TileBackend("the CPU's", None, {}, forward, backward, splits_keys=False)
    return TileChoice(backend, backend, "test", processors=4)


@pytest.mark.parametrize(("shape", "window"), [((70, 71), None), ((70, 71), 16), ((5, 2500), None), ((16, 40), 5)])
def test_tiles_of_a_gpu(shape: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_choice, "choice_for", lambda q, k: on_the_cpu())
    inputs = [*random_qkv(*shape), SINKS]
    expected = with_gradients(lambda q, k, v, b: reference(q, k, v, b, window), inputs)
    with pretend_gpu(monkeypatch):
        there = [OnGpu(x.clone(), requires_grad=True) for x in inputs]
        out = blockwise.attention(*there[:3], SCALE, window, there[3])
        upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out, there, OnGpu(upstream))
        found = [x.detach().cpu() for x in (out, *grads)]
    require_close(found, expected)


# ------------------------------------------------------------------------------------------------- over ranks

CASES = [(8, None), (61, None), (61, 2), (61, 17), (48, 100)]


def shares(world: World, cases: list[tuple[int, int | None]], dtype: torch.dtype) -> list[list[Tensor]]:
    """Out and gradients of this rank's share of each case."""
    found = []
    for tokens, window in cases:
        ring = Ring(zigzag(tokens, world.size), world.rank)
        own = ring.placement.positions(world.rank)
        inputs = [*(x[:, :, own].requires_grad_() for x in random_qkv(tokens, tokens, dtype=dtype))]
        sinks = SINKS.to(dtype, copy=True).requires_grad_()
        out = ring_module.attention(*inputs, SCALE, window, sinks, ring=ring)
        upstream = torch.randn(2, 6, tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(out, [*inputs, sinks], upstream[:, :, own].to(dtype))
        with torch.no_grad():
            again = ring_module.attention(*inputs, SCALE, window, sinks, ring=ring)
        torch.testing.assert_close(again, out, rtol=0, atol=1e-6)
        found.append([out.detach(), *grads])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_ring_equals_one_process(tmp_path: Path, ranks: int) -> None:
    found = on_ranks(tmp_path, ranks, shares, CASES, torch.float64)
    for case, (tokens, window) in enumerate(CASES):
        inputs = [*random_qkv(tokens, tokens), SINKS]
        expected = with_gradients(lambda q, k, v, b, window=window: reference(q, k, v, b, window), inputs)
        order = zigzag(tokens, ranks).order()
        parts = [share[case] for share in found]
        whole = [torch.cat([part[i] for part in parts], 2)[:, :, order] for i in range(4)]
        require_close([*whole, torch.stack([part[4] for part in parts]).sum(0)], expected)
