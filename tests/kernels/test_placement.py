"""Where the tokens of a shared sequence are, and the tiles between two shares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels.placement import Runs, contiguous, count, seen, tiles_between, zigzag
from retrofit.kernels.tiles import Tile

WINDOWS = [None, 1, 2, 3, 5, 8, 30]
RUNS: list[Runs] = [((0, 7),), ((3, 12),), ((7, 9), (12, 17)), ((0, 4), (20, 23)), ((5, 6),), ((16, 24),), ((0, 24),)]


def positions(runs: Runs) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def each(tile: Tile) -> list[Tile]:
    """Tiles side by side one by one."""
    assert tile.count == 1 or tile.step >= max(tile.q1 - tile.q0, tile.k1 - tile.k0)
    return [
        Tile(tile.q0 + ahead, tile.q1 + ahead, tile.k0 + ahead, tile.k1 + ahead, tile.kind)
        for ahead in (index * tile.step for index in range(tile.count))
    ]


def visible(queries: Runs, keys: Runs, window: int | None) -> Tensor:
    p, j = positions(queries)[:, None], positions(keys)[None]
    return (j <= p) & (j > p - (window or 10**6))


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_tiles_cover_every_visible_pair_once_wherever_the_runs_are(window: int | None, side_by_side: bool) -> None:
    for queries, keys in itertools.product(RUNS, RUNS):
        pairs = torch.zeros(count(queries), count(keys), dtype=torch.int)
        plan = tiles_between(queries, keys, window, side_by_side=side_by_side)
        for tile in itertools.chain.from_iterable(each(tile) for tile in plan):
            n, m = tile.q1 - tile.q0, tile.k1 - tile.k0
            assert n > 0
            assert m > 0
            assert tile.kind == "full" or n == m
            shape = {"full": torch.ones(n, m), "causal": torch.ones(n, m).tril(), "edge": torch.ones(n, m).triu()}
            pairs[tile.q0 : tile.q1, tile.k0 : tile.k1] += shape[tile.kind].int()
        assert torch.equal(pairs, visible(queries, keys, window).int()), (queries, keys)


@pytest.mark.parametrize("window", WINDOWS)
def test_seen_keys_are_those_of_the_visible_pairs(window: int | None) -> None:
    for queries, keys in itertools.product(RUNS, RUNS):
        expected = positions(keys)[visible(queries, keys, window).any(0)].tolist()
        runs = seen(keys, queries, window)
        assert [p for start, stop in runs for p in range(start, stop)] == expected, (queries, keys)
        assert all(start < stop for start, stop in runs)


def test_a_share_needs_few_tiles() -> None:
    early, late = zigzag(64, 4).shares[0], zigzag(64, 4).shares[3]
    assert len(tiles_between(early, early, None)) == 3
    assert len(tiles_between(late, early, None)) == 1
    assert len(tiles_between(early, late, None)) == 1


def test_a_window_is_a_few_tiles_side_by_side() -> None:
    runs = ((0, 4096), (28672, 32768))
    plan = tiles_between(runs, runs, 256, side_by_side=True)
    assert len(plan) < 8
    assert sum(tile.count for tile in plan) == len(tiles_between(runs, runs, 256))


@pytest.mark.parametrize("tokens", [8, 9, 15, 64, 1001])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_position_is_on_one_rank(tokens: int, ranks: int) -> None:
    for placement in (zigzag(tokens, ranks), contiguous(tokens, ranks)):
        whole = torch.cat([placement.positions(rank) for rank in range(ranks)])
        assert torch.equal(whole[placement.order()], torch.arange(tokens))
        assert placement.tokens == tokens
        sizes = [count(share) for share in placement.shares]
        assert max(sizes) - min(sizes) <= 2


def test_zigzag_is_the_chunks_r_and_2n_minus_1_minus_r() -> None:
    assert zigzag(24, 3).shares == (((0, 4), (20, 24)), ((4, 8), (16, 20)), ((8, 16),))


def test_zigzag_evens_out_causal_work() -> None:
    even, uneven = zigzag(4096, 4), contiguous(4096, 4)
    work = [even.pairs(rank) for rank in range(4)]
    assert sum(work) == 4096 * 4097 // 2
    assert max(work) / min(work) < 1.001
    assert uneven.pairs(3) / (sum(work) / 4) == pytest.approx(1.75, abs=0.001)


def test_fewer_tokens_than_chunks_are_refused() -> None:
    with pytest.raises(UserError, match="5 tokens cannot be cut into 6 chunks for 3 ranks"):
        zigzag(5, 3)
    with pytest.raises(UserError, match="2 tokens cannot be cut into 3 chunks for 3 ranks"):
        contiguous(2, 3)
