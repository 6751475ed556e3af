"""Which KV heads share: the partition into groups of one size with the least predicted cost.

Every partition is tried where there are few (8 heads into 4 pairs: 105); otherwise groups are filled greedily and heads
swapped between them while that helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from math import factorial

from retrofit.kv_heads.merge import Groups, contiguous_groups

GroupCost = Callable[[tuple[int, ...]], float]
_EXHAUSTIVE = 2000


def count_partitions(heads: int, groups: int) -> int:
    """Partitions of `heads` into `groups` unordered groups of equal size."""
    size = heads // groups
    return factorial(heads) // (factorial(size) ** groups * factorial(groups))


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
    cached = lru_cache(maxsize=None)(cost)
    if count_partitions(kv_heads, groups) <= _EXHAUSTIVE:
        return min(partitions(tuple(range(kv_heads)), kv_heads // groups), key=lambda p: sum(map(cached, p)))
    return _swap_search(_greedy(kv_heads, groups, cached), cached)


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


def _swap_search(start: Groups, cost: GroupCost) -> Groups:
    """Swap two heads of different groups while that lowers the cost of the two."""
    current = list(start)
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(len(current)), 2):
            before = cost(current[a]) + cost(current[b])
            pairs = [
                (
                    tuple(sorted((*(h for h in current[a] if h != i), j))),
                    tuple(sorted((*(h for h in current[b] if h != j), i))),
                )
                for i in current[a]
                for j in current[b]
            ]
            best = min(pairs, key=lambda pair: cost(pair[0]) + cost(pair[1]))
            if cost(best[0]) + cost(best[1]) < before * (1 - 1e-9):
                current[a], current[b] = best
                improved = True
    return tuple(sorted(current))
