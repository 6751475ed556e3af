"""Ring attention on one to four processes against softmax written out with a mask over the whole sequence."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels import ring as ring_module
from retrofit.kernels.placement import contiguous, count, zigzag
from retrofit.kernels.ring import attention
from retrofit.kernels.ring_group import Ring
from retrofit.system.world import World
from tests.kernels.test_blockwise import random_qkv, reference
from tests.ranks import on_ranks

SCALE = 0.3
HEADS = {"heads": 6, "kv_heads": 2, "dim": 16}
# (tokens, window): lengths that divide and that do not; windows within a chunk, across chunks, wider than the text
CASES = [(8, None), (48, None), (61, None), (48, 1), (61, 2), (61, 5), (48, 17), (61, 40), (61, 61), (48, 100)]


class Share(NamedTuple):
    """What one rank computed of one case, and the bytes it sent forward and backward."""

    out: Tensor
    grads: list[Tensor]
    forward: int
    backward: int


def assert_close(found: Tensor, expected: Tensor, atol: float, case: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda text: f"{case}: {text}")


def upstream(tokens: int) -> Tensor:
    return torch.randn(2, 6, tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shares_as_on_a_gpu(world: World, cases: list[tuple[int, int | None]]) -> list[Share]:
    """Equal tiles are computed at once."""
    ring_module.many_at_once = lambda q: True
    return shares(world, cases, torch.float64, True)


def shares(world: World, cases: list[tuple[int, int | None]], dtype: torch.dtype, zigzagged: bool) -> list[Share]:
    sent = [0]
    exchange = ring_module.dist.batch_isend_irecv

    def counted(operations: list) -> list:
        sent[0] += sum(op.tensor.nbytes for op in operations if op.op is ring_module.dist.isend)
        return exchange(operations)

    ring_module.dist.batch_isend_irecv = counted
    results = []
    for tokens, window in cases:
        placement = (zigzag if zigzagged else contiguous)(tokens, world.size)
        ring, own = Ring(placement, world.rank), placement.positions(world.rank)
        inputs = [x[:, :, own].requires_grad_() for x in random_qkv(tokens, tokens, dtype=dtype)]
        sent[0] = 0
        out = attention(*inputs, SCALE, window, ring=ring)
        forward, sent[0] = sent[0], 0
        grads = torch.autograd.grad(out, inputs, upstream(tokens)[:, :, own].to(dtype))
        with torch.no_grad():
            torch.testing.assert_close(attention(*inputs, SCALE, window, ring=ring), out, rtol=0, atol=3e-2)
        results.append(Share(out.detach(), list(grads), forward, sent[0] - forward))
    ring_module.dist.batch_isend_irecv = exchange
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_values_and_gradients_equal_masked_softmax(tmp_path: Path, ranks: int) -> None:
    require_exact(on_ranks(tmp_path, ranks, shares, CASES, torch.float64, True), CASES)


def test_tiles_side_by_side_equal_masked_softmax(tmp_path: Path) -> None:
    cases = [(61, 2), (61, 5), (96, 3), (96, 11)]
    require_exact(on_ranks(tmp_path, 2, shares_as_on_a_gpu, cases), cases)


def require_exact(found: list[list[Share]], cases: list[tuple[int, int | None]]) -> None:
    ranks = len(found)
    for case, (tokens, window) in enumerate(cases):
        inputs = [x.requires_grad_() for x in random_qkv(tokens, tokens)]
        expected = reference(*inputs, SCALE, window)
        gradients = torch.autograd.grad(expected, inputs, upstream(tokens))
        order = zigzag(tokens, ranks).order()
        parts = [share[case] for share in found]
        # The CPU op's exponential is good to 4e-7, in double precision too.
        out = torch.cat([part.out for part in parts], 2)[:, :, order]
        assert_close(out, expected, 2e-6, (tokens, window))
        for index, gradient in enumerate(gradients):
            ours = torch.cat([part.grads[index] for part in parts], 2)[:, :, order]
            assert_close(ours, gradient, 5e-6, (tokens, window))


def test_contiguous_shares_are_right_too(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 3, shares, [(61, None), (61, 12)], torch.float64, False)
    for case, window in enumerate((None, 12)):
        out = torch.cat([share[case].out for share in found], 2)
        torch.testing.assert_close(out, reference(*random_qkv(61, 61), SCALE, window), rtol=0, atol=2e-6)


def test_bfloat16_is_merged_in_float32(tmp_path: Path) -> None:
    """As near to the exact result as one kernel over the whole sequence."""
    found = on_ranks(tmp_path, 4, shares, [(256, None)], torch.bfloat16, True)
    out = torch.cat([share[0].out for share in found], 2)[:, :, zigzag(256, 4).order()]
    inputs = random_qkv(256, 256, dtype=torch.bfloat16)
    exact = reference(*(x.double() for x in inputs), SCALE, None)
    from retrofit.kernels.blockwise import block

    whole = (block(*inputs, True, SCALE)[0].double() - exact).square().mean().sqrt()
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).square().mean().sqrt() < 1.5 * whole


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_wire_carries_keys_and_values_of_kv_heads(tmp_path: Path, ranks: int) -> None:
    """(N - 1) x 2 n K D items of keys and values forward, the same backward and their gradients in float32."""
    tokens = 16 * ranks
    found = on_ranks(tmp_path, ranks, shares, [(tokens, None)], torch.bfloat16, True)
    items = (ranks - 1) * 2 * (2 * 16 * 2 * 16)  # batch 2, n = 16, K = 2, D = 16
    for share in found:
        assert share[0].forward == items * 2
        assert share[0].backward == items * (2 + 4)


def test_a_window_sends_what_others_see_and_nothing_else(tmp_path: Path) -> None:
    tokens, window, ranks = 64, 5, 4
    found = on_ranks(tmp_path, ranks, shares, [(tokens, window), (tokens, 1)], torch.float32, True)
    # 8 chunks of 8: each of the 7 borders is crossed by window - 1 keys, but the one between two chunks of rank 3.
    keys = 6 * (window - 1)
    assert sum(share[0].forward for share in found) == keys * 2 * (2 * 2 * 16) * 4
    assert sum(share[0].backward for share in found) == 2 * keys * 2 * (2 * 2 * 16) * 4
    assert [share[1].forward for share in found] == [0] * ranks


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_share_of_another_length_is_refused() -> None:
    q, k, v = random_qkv(12, 12)
    with pytest.raises(UserError, match="holds 16 of 16 tokens and was given 12 queries and 12 keys"):
        attention(q, k, v, SCALE, None, ring=Ring(zigzag(16, 1)))


def test_a_group_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="2 shares over a group of 1 ranks"):
        Ring(zigzag(16, 2))


def test_what_the_tiles_cannot_express_is_refused() -> None:
    q, k, v = random_qkv(8, 8)
    for wrong in ((q, k, v[..., :8]), (q[:, :5], k, v)):
        with pytest.raises(UserError, match="one head dim"):
            attention(*wrong, SCALE, None, ring=Ring(zigzag(8, 1)))


def test_the_share_of_a_rank() -> None:
    assert count(Ring(zigzag(9, 1)).runs) == 9
