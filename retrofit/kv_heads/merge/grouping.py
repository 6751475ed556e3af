"""Which KV heads share: the partition into groups of one size with the least predicted cost.

What is searched, by how much there is to search:

- Pairs (groups of 2): a minimum-weight perfect matching on the costs of all pairs, exact for any number of heads.
- Few different groups (8 heads into 2 groups of 4: 70): every partition.
- Otherwise a group is first estimated by the mean of what its pairs lose. That is arithmetic on a K x K table, so it
  is searched thoroughly: groups filled greedily, then heads swapped while that helps. The most promising swaps are then
  tried by the true cost, as many as a count that falls with the size of a group allows (never a clock: the same input
  gives the same groups).

One true cost takes eigenvalues of an (s D) x (s D) matrix, whose time grows with the cube of s: 32 heads of dim 128 in
8 groups take 496 of 256 x 256 for the table and some tens of 512 x 512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from math import comb

import networkx

from retrofit.kv_heads.merge.joint import Groups, contiguous_groups

GroupCost = Callable[[tuple[int, ...]], float]
_EXHAUSTIVE = 100  # different groups whose true cost is computed
_TRIED = 3072  # true costs of a search that starts from an estimate, times the cube of the group's size


def partitions(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    """All partitions of `heads` into unordered groups of `size`."""
    if not heads:
        yield ()
        return
    first, rest = heads[0], heads[1:]
    for mates in combinations(rest, size - 1):
        left = tuple(h for h in rest if h not in mates)
        for others in partitions(left, size):
            yield ((first, *mates), *others)


def best_groups(kv_heads: int, groups: int, cost: GroupCost) -> Groups:
    """The cheapest partition of `kv_heads` into `groups`; groups and heads within them in ascending order."""
    if groups in (1, kv_heads):
        return contiguous_groups(kv_heads, groups)
    size, cached = kv_heads // groups, lru_cache(maxsize=None)(cost)
    if size == 2:
        return _matching(kv_heads, cached)
    if comb(kv_heads, size) <= _EXHAUSTIVE:
        return min(partitions(tuple(range(kv_heads)), size), key=lambda p: sum(map(cached, p)))
    pairs = {pair: cached(pair) for pair in combinations(range(kv_heads), 2)}

    def estimate(group: tuple[int, ...]) -> float:
        return sum(pairs[pair] for pair in combinations(group, 2)) / max(len(group) - 1, 1)

    start = _swap_search(_greedy(kv_heads, groups, estimate), estimate)
    return _tried(start, estimate, cached, _TRIED // size**3)


def _matching(kv_heads: int, cost: GroupCost) -> Groups:
    """Pairs of least total cost (Edmonds' blossom algorithm)."""
    graph = networkx.Graph()
    graph.add_weighted_edges_from((a, b, cost((a, b))) for a, b in combinations(range(kv_heads), 2))
    return tuple(sorted((min(pair), max(pair)) for pair in networkx.min_weight_matching(graph)))


def _greedy(kv_heads: int, groups: int, cost: GroupCost) -> Groups:
    """Fill one group after the other, always with the head that costs it least."""
    left, found = list(range(kv_heads)), []
    for _ in range(groups):
        group: tuple[int, ...] = (left.pop(0),)
        while len(group) < kv_heads // groups:
            mate = min(left, key=lambda h, group=group: cost(tuple(sorted((*group, h)))))  # type: ignore[misc]
            left.remove(mate)
            group = tuple(sorted((*group, mate)))
        found.append(group)
    return tuple(found)


def _swaps(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Both groups after each swap of one head of `a` with one of `b`."""
    return [
        (tuple(sorted((*(h for h in a if h != i), j))), tuple(sorted((*(h for h in b if h != j), i))))
        for i in a
        for j in b
    ]


def _swap_search(start: Groups, cost: GroupCost) -> Groups:
    """Swap two heads of different groups while that lowers the cost of the two."""
    current = list(start)
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(len(current)), 2):
            before = cost(current[a]) + cost(current[b])
            best = min(_swaps(current[a], current[b]), key=lambda pair: cost(pair[0]) + cost(pair[1]))
            if cost(best[0]) + cost(best[1]) < before * (1 - 1e-9):
                current[a], current[b] = best
                improved = True
    return tuple(sorted(current))


def _tried(start: Groups, estimate: GroupCost, cost: GroupCost, tries: int) -> Groups:
    """Swaps in the order of their estimate, kept where the true cost falls, until `tries` true costs are computed."""
    current, asked = list(start), set()

    def true(group: tuple[int, ...]) -> float:
        asked.add(group)
        return cost(group)

    improved = True
    while improved:
        improved = False
        swaps = [
            (estimate(new[0]) + estimate(new[1]) - estimate(current[a]) - estimate(current[b]), a, b, new)
            for a, b in combinations(range(len(current)), 2)
            for new in _swaps(current[a], current[b])
        ]
        for _, a, b, new in sorted(swaps):
            if len(asked | {current[a], current[b], *new}) > tries:
                return tuple(sorted(current))
            if true(new[0]) + true(new[1]) < (true(current[a]) + true(current[b])) * (1 - 1e-9):
                current[a], current[b] = new
                improved = True
                break
    return tuple(sorted(current))
