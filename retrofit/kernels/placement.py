"""Where the tokens of one sequence are when several ranks hold a share each, and the tiles between any two shares.

A share is a row of runs [start, stop) of positions; its tensors hold these tokens one run after the other. Causal
attention gives late positions more work than early ones, so `zigzag` gives every rank an early and a late chunk.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from retrofit.errors import UserError
from retrofit.kernels.tiles import Tile

if TYPE_CHECKING:
    from torch import Tensor

Run = tuple[int, int]
Runs = tuple[Run, ...]


@dataclass(frozen=True)
class Placement:
    """Which positions each rank holds. shares: of every rank its runs, which together are 0 ... tokens - 1."""

    shares: tuple[Runs, ...]

    @property
    def ranks(self) -> int:
        return len(self.shares)

    @property
    def tokens(self) -> int:
        return sum(count(runs) for runs in self.shares)

    def positions(self, rank: int) -> Tensor:
        """The positions that a rank holds, int64 [n], in the order of its tensors."""
        import torch

        return torch.cat([torch.arange(start, stop) for start, stop in self.shares[rank]])

    def order(self) -> Tensor:
        """int64 [tokens]: where each position is in the shares of all ranks, one after the other."""
        import torch

        return torch.cat([self.positions(rank) for rank in range(self.ranks)]).argsort()

    def pairs(self, rank: int, window: int | None = None) -> int:
        """(query, key) pairs that a rank computes: its work."""
        return sum(tile_pairs(tile) for keys in self.shares for tile in tiles_between(self.shares[rank], keys, window))


def zigzag(tokens: int, ranks: int) -> Placement:
    """Rank r of N holds the chunks r and 2N - 1 - r of 2N, which differ by a token at most where 2N does not divide.

    Raises: UserError for fewer tokens than chunks.
    """
    _require_tokens(tokens, 2 * ranks, ranks)
    bounds = [index * tokens // (2 * ranks) for index in range(2 * ranks + 1)]
    chunks = list(itertools.pairwise(bounds))
    return Placement(tuple(_joined(chunks[rank], chunks[-1 - rank]) for rank in range(ranks)))


def contiguous(tokens: int, ranks: int) -> Placement:
    """Rank r of N holds the r-th of N chunks: the last rank has nearly twice the mean work.

    Raises: UserError for fewer tokens than ranks.
    """
    _require_tokens(tokens, ranks, ranks)
    bounds = [index * tokens // ranks for index in range(ranks + 1)]
    return Placement(tuple((chunk,) for chunk in itertools.pairwise(bounds)))


def count(runs: Runs) -> int:
    """Positions in some runs."""
    return sum(stop - start for start, stop in runs)


@lru_cache(maxsize=4096)
def seen(keys: Runs, queries: Runs, window: int | None) -> Runs:
    """The runs of `keys` that one of `queries` sees."""
    found: list[Run] = []
    for first, last in keys:
        reaches = sorted(
            (max(first, 0 if window is None else start - window + 1), min(last, stop)) for start, stop in queries
        )
        for start, stop in reaches:
            if start >= stop:
                continue
            if found and first <= found[-1][0] and start <= found[-1][1]:
                found[-1] = found[-1][0], max(found[-1][1], stop)
            else:
                found.append((start, stop))
    return tuple(found)


@lru_cache(maxsize=4096)
def tiles_between(queries: Runs, keys: Runs, window: int | None, *, side_by_side: bool = False) -> tuple[Tile, ...]:
    """Tiles that cover exactly the visible pairs between two shares, each once; indices into the shares' tensors.

    A key j is visible to the query at position p when p - window < j <= p (no window: j <= p). Causal tiles come first.
    side_by_side: as in `tiles.tiles`.
    """
    plan: list[Tile] = []
    q0 = 0
    for run in queries:
        k0 = 0
        for key_run in keys:
            plan += [
                Tile(q0 + t.q0 - run[0], q0 + t.q1 - run[0], k0 + t.k0 - key_run[0], k0 + t.k1 - key_run[0], t.kind)
                for t in _tiles(run, key_run, window)
            ]
            k0 += key_run[1] - key_run[0]
        q0 += run[1] - run[0]
    full = _coalesced([tile for tile in plan if tile.kind == "full"])
    causal, edge = ([tile for tile in plan if tile.kind == kind] for kind in ("causal", "edge"))
    if side_by_side:
        causal, full, edge = _counted(causal), _counted(full), _counted(edge)
    return (*causal, *full, *edge)


def tile_pairs(tile: Tile) -> int:
    """Visible (query, key) pairs of a tile."""
    queries, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    return tile.count * (queries * keys if tile.kind == "full" else queries * (queries + 1) // 2)


def _tiles(queries: Run, keys: Run, window: int | None) -> list[Tile]:
    """Tiles between two runs, as positions. Queries go in bands no longer than the window, so that a band sees three
    kinds of keys: its own (a causal triangle), those all of it sees, and those at the window's far end (a triangle)."""
    (first, last), (start, stop) = keys, queries
    start = max(start, first)
    if window is not None:
        stop = min(stop, last + window - 1)
    plan: list[Tile] = []
    while start < stop:
        end = stop if window is None else min(stop, start + window)
        edge = first if window is None else max(first, end - window)  # from here on all of the band sees a key
        plan += _triangle(start, end, max(start, first), min(end, last), "causal")
        plan += _tile(start, end, edge, min(start, last), "full")
        if window is not None:
            plan += _triangle(start, end, max(start - window + 1, first), min(end - window, last), "edge", window)
        start = end
    return plan


def _triangle(start: int, end: int, k0: int, k1: int, kind: Literal["causal", "edge"], window: int = 0) -> list[Tile]:
    """The keys [k0, k1) against the queries [start, end) of a band, where p sees j <= p, or at the edge j > p - window.

    A triangle that the keys cut short is a smaller one and a rectangle: queries after it (causal) or before it (edge).
    """
    if kind == "causal":
        return [*_tile(k0, k1, k0, k1, kind), *_tile(max(k1, start), end, k0, k1, "full")]
    q0, q1 = k0 + window - 1, k1 + window - 1  # the query that sees no key before k0, and the one that sees none at all
    return [*_tile(start, q0, k0, k1, "full"), *_tile(q0, q1, k0, k1, kind)]


def _tile(q0: int, q1: int, k0: int, k1: int, kind: Literal["full", "causal", "edge"]) -> list[Tile]:
    return [Tile(q0, q1, k0, k1, kind)] if q0 < q1 and k0 < k1 else []


def _coalesced(full: list[Tile]) -> list[Tile]:
    """Full tiles with neighbours joined: fewer and larger."""
    for along_keys in (True, False):
        joined: list[Tile] = []
        for tile in sorted(full, key=lambda t: (t.q0, t.q1, t.k0) if along_keys else (t.k0, t.k1, t.q0)):
            before = joined[-1] if joined else None
            if before and along_keys and (before.q0, before.q1, before.k1) == (tile.q0, tile.q1, tile.k0):
                joined[-1] = Tile(tile.q0, tile.q1, before.k0, tile.k1, "full")
            elif before and not along_keys and (before.k0, before.k1, before.q1) == (tile.k0, tile.k1, tile.q0):
                joined[-1] = Tile(before.q0, tile.q1, tile.k0, tile.k1, "full")
            else:
                joined.append(tile)
        full = joined
    return full


def _counted(plan: list[Tile]) -> list[Tile]:
    """Tiles of one kind with those that follow one another in equal steps as one with a count."""
    counted: list[Tile] = []
    for tile in plan:
        size, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
        before = counted[-1] if counted else None
        if before and (before.q1 - before.q0, before.k1 - before.k0) == (size, keys):
            last = (before.count - 1) * before.step
            step = tile.q0 - before.q0 - last
            even = step == tile.k0 - before.k0 - last and step >= max(size, keys)
            if even and before.step in (0, step):
                counted[-1] = replace(before, count=before.count + 1, step=step)
                continue
        counted.append(tile)
    return counted


def _joined(early: Run, late: Run) -> Runs:
    return ((early[0], late[1]),) if early[1] == late[0] else (early, late)


def _require_tokens(tokens: int, chunks: int, ranks: int) -> None:
    if tokens < chunks:
        raise UserError(
            f"a sequence of {tokens} tokens cannot be cut into {chunks} chunks for {ranks} ranks",
            fix=f"use sequences of at least {chunks} tokens, or fewer ranks for one sequence",
        )
