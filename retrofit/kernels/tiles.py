"""Causal attention cut into tiles that need no mask.

full    every query of the tile sees every key of it
causal  as many keys as queries, query i sees keys j <= i
edge    the far end of a sliding window: query i sees keys j >= i (a causal tile with both runs reversed)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tile:
    """Queries [q0, q1) against keys [k0, k1), indices into the given tensors.

    count: so many tiles of this size, each `step` queries and `step` keys after the one before, no less than its size.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Literal["full", "causal", "edge"]
    count: int = 1
    step: int = 0


def tiles(
    queries: int, keys: int, window: int | None, run: int | None = None, *, side_by_side: bool = False
) -> list[Tile]:
    """Tiles that cover exactly the visible (query, key) pairs, each once.

    A key j is visible to the query at position p when p - window < j <= p (no window: j <= p). run: causal tiles that
    start a sequence are at most this long, the rest of the triangle is full tiles. side_by_side: tiles along a sliding
    window that have the same size are one with a count, so that a GPU computes them at once.
    """
    assert 0 < queries <= keys
    offset = keys - queries
    # Positions below `window` see everything before them.
    free = queries if window is None else min(max(window - offset, 0), queries)
    plan: list[Tile] = []
    if free == 1:
        plan.append(Tile(0, 1, 0, offset + 1, "full"))
    elif free:
        for start in range(0, free, run or free):
            stop = min(start + (run or free), free)
            plan += [Tile(start, stop, 0, offset + start, "full")] if offset + start else []
            plan.append(Tile(start, stop, offset + start, offset + stop, "causal"))
    done = free
    if window is not None and side_by_side and (count := (queries - free) // window) > 1:
        first = offset + free
        plan.append(Tile(free, free + window, first, first + window, "causal", count, window))
        if window > 1:
            plan.append(Tile(free, free + window - 1, first - window + 1, first, "edge", count, window))
        done += count * window
    for start in range(done, queries, window or queries):
        assert window is not None
        stop = min(start + window, queries)
        first, last = offset + start, offset + stop  # positions [first, last) of these queries
        plan.append(Tile(start, stop, first, last, "causal"))
        if last - window < first:
            plan.append(Tile(start, stop, last - window, first, "full"))
        if stop - start > 1:
            plan.append(Tile(start, stop - 1, first - window + 1, last - window, "edge"))
    return plan
