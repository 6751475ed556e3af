"""Pooled heads against sums written out, and against the general maps of a merge."""

import pytest
import torch

from retrofit.kv_heads.merge.joint import apply_maps, contiguous_groups, mean_maps
from retrofit.kv_heads.merge.pooling import POOLING, pool
from retrofit.kv_heads.merge.weights import LayerWeights


def layer(kv_heads: int) -> LayerWeights:
    torch.manual_seed(0)
    shapes = {"q_HDC": (24, 4, 6), "k_KDC": (kv_heads, 4, 6), "v_KDC": (kv_heads, 4, 6), "o_CHD": (6, 24, 4)}
    shapes |= {"k_bias_KD": (kv_heads, 4), "v_bias_KD": (kv_heads, 4), "k_norm_KD": (kv_heads, 4)}
    return LayerWeights(**{name: torch.randn(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
def test_a_pooled_head_is_the_mean_or_the_first_of_its_group(size: int) -> None:
    weights = layer(12)
    mean, first = (pool(weights, POOLING[method](size)) for method in ("mean", "first"))
    for name in ("k_KDC", "v_KDC", "k_bias_KD", "v_bias_KD"):
        old = getattr(weights, name)
        assert torch.equal(getattr(first, name), old[::size])
        want = torch.stack([old[n : n + size].double().mean(0) for n in range(0, 12, size)])
        assert torch.allclose(getattr(mean, name).double(), want, atol=1e-7)
    assert mean.q_HDC is weights.q_HDC
    assert mean.o_CHD is weights.o_CHD
    if size == 1:
        assert torch.equal(mean.k_KDC, weights.k_KDC)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_the_mean_has_the_bytes_of_a_merge_by_mean_maps(size: int) -> None:
    weights, groups = layer(12), 12 // size
    merged = apply_maps(weights, mean_maps(12, groups, 4), contiguous_groups(12, groups))
    mean = pool(weights, POOLING["mean"](size))
    for name in ("k_KDC", "v_KDC", "k_bias_KD", "v_bias_KD", "k_norm_KD"):
        assert torch.equal(getattr(mean, name), getattr(merged, name))
