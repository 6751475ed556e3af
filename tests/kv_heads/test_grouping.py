"""The search for groups against trying everything, and how much it computes."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from retrofit.kv_heads.calibrate.moments import LayerMoments, MomentSums
from retrofit.kv_heads.merge.grouping import best_groups, partitions
from retrofit.kv_heads.merge.joint import (
    contiguous_groups,
    group_cost,
    merge_keys,
    merge_values,
    output_metric,
)
from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.model.spec import RopeSpec


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("heads", "groups", "count"), [(4, 2, 3), (6, 3, 15), (6, 2, 10), (8, 4, 105)])
def test_partitions_are_all_of_them_once(heads: int, groups: int, count: int) -> None:
    found = list(partitions(tuple(range(heads)), heads // groups))
    assert len(found) == len(set(found)) == count
    assert all(sorted(h for g in p for h in g) == list(range(heads)) for p in found)


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (12, 3), (32, 8)])
def test_grouping_finds_the_planted_groups(heads: int, groups: int) -> None:
    family = torch.randperm(heads) % groups  # heads of one family cost nothing together

    def cost(group: tuple[int, ...]) -> float:
        return float(len({int(family[h]) for h in group}) - 1)

    best = best_groups(heads, groups, cost)
    assert sum(map(cost, best)) == 0
    assert best_groups(heads, heads, cost) == contiguous_groups(heads, heads)


def layer(heads: int, head_dim: int, families: int, rope: RopeSpec | None) -> tuple[LayerMoments, LayerWeights]:
    """A random layer whose heads resemble one of a few, with biases."""
    width = 48
    stream = torch.randn(400, width) * torch.linspace(2, 0.05, width)
    member = torch.randint(families, (heads,))
    q, k, v = (
        torch.randn(heads, head_dim, width) + 1.5 * torch.randn(families, head_dim, width)[member] for _ in "qkv"
    )
    bias = torch.randn(heads, head_dim)
    sums = MomentSums(heads)
    sums.add(*(torch.einsum("tc,kdc->tkd", stream, w) + bias for w in (q, k, v)))
    return sums.finish(0), LayerWeights(q, k, v, torch.randn(width, heads, head_dim), o_bias_C=torch.zeros(width))


@pytest.mark.parametrize("rope", [None, RopeSpec("default", 1e4, 8), RopeSpec("default", 1e4, 4)])
def test_a_group_costs_what_its_merge_loses(rope: RopeSpec | None) -> None:
    moments, weights = layer(6, 8, 2, rope)
    metric, heads = output_metric(weights), (0, 2, 5)
    everyone = [(h,) for h in range(6)]
    keys = merge_keys(moments, heads, rope, 8)[2] / sum(merge_keys(moments, h, rope, 8)[3] for h in everyone)
    values = merge_values(moments, heads, metric, centred=True)[2]
    values /= sum(merge_values(moments, h, metric, centred=True)[3] for h in everyone)
    assert group_cost(moments, weights, rope)(heads) == pytest.approx(keys + values, rel=1e-3)
    assert group_cost(moments, weights, rope, keys=False)(heads) == pytest.approx(values, rel=1e-3)


def test_pairs_are_matched_exactly() -> None:
    table = torch.rand(8, 8)

    def cost(pair: tuple[int, ...]) -> float:
        return float(table[pair[0], pair[1]])

    found = best_groups(8, 4, cost)
    assert sum(map(cost, found)) == pytest.approx(min(sum(map(cost, p)) for p in partitions(tuple(range(8)), 2)))


def test_a_search_from_pair_costs_comes_close_to_trying_everything() -> None:
    rope = RopeSpec("default", 1e4, 8)
    for seed in range(3):
        torch.manual_seed(seed)
        cost = lru_cache(None)(group_cost(*layer(12, 8, 4, rope), rope))
        best = min(sum(map(cost, p)) for p in partitions(tuple(range(12)), 3))
        start = sum(map(cost, contiguous_groups(12, 4)))
        found = best_groups(12, 4, cost)
        assert sum(map(cost, found)) - best < 0.02 * (start - best)


@pytest.mark.parametrize(("groups", "large"), [(16, 0), (8, 48), (4, 6), (2, 0)])
def test_a_layer_of_32_heads_takes_a_bounded_number_of_costs(groups: int, large: int) -> None:
    asked: list[int] = []
    rope = RopeSpec("default", 1e4, 8)
    cost = group_cost(*layer(32, 8, 8, rope), rope)

    def counted(group: tuple[int, ...]) -> float:
        asked.append(len(group))
        return cost(group)

    found = best_groups(32, groups, counted)
    assert sorted(h for g in found for h in g) == list(range(32))
    assert asked.count(2) == 496
    assert sum(size > 2 for size in asked) <= large
    assert sum(map(cost, found)) < sum(map(cost, contiguous_groups(32, groups)))
