"""Arithmetic of the model of ring attention on N GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retrofit.kernels.placement import zigzag
from retrofit.kernels.ring_cost import (
    AttentionShape,
    Link,
    backward_time,
    forward_flops,
    forward_time,
    hidden_from,
    hidden_from_backward,
    ulysses_bytes,
    ulysses_copies,
)

SHAPE = AttentionShape(heads=32, kv_heads=8, head_dim=128)
LINK = Link(rate=400e12, bandwidth=50e9)


def test_transfers_hide_from_the_length_that_the_formula_gives() -> None:
    assert hidden_from(SHAPE, LINK) == 4000
    ranks = 8
    assert forward_time(ranks * 4001, ranks, SHAPE, LINK).exposed == 0
    assert forward_time(ranks * 3000, ranks, SHAPE, LINK).exposed > 0


def test_the_backward_pass_hides_from_its_own_length_but_for_the_way_home() -> None:
    tokens = 8 * (int(hidden_from_backward(SHAPE, LINK)) + 1)
    home = 2 * (tokens / 8) * 8 * 128 * 4 / 50e9
    assert hidden_from_backward(SHAPE, LINK) == 4000 * 6 / 2 / 2.5
    assert backward_time(tokens, 8, SHAPE, LINK).exposed == pytest.approx(home)
    assert backward_time(tokens // 2, 8, SHAPE, LINK).exposed > home


def test_bytes_are_those_that_ring_attention_sends() -> None:
    """As counted in test_ring: (N - 1) x 2 n K D items, and in the backward pass their gradients in float32 too."""
    items = 3 * 2 * 1000 * 8 * 128
    assert forward_time(4000, 4, SHAPE, LINK).bytes_sent == items * 2
    assert backward_time(4000, 4, SHAPE, LINK).bytes_sent == items * (2 + 4)


def test_work_is_that_of_the_placement() -> None:
    for window in (None, 100):
        shape = replace(SHAPE, window=window)
        pairs = sum(zigzag(4096, 4).pairs(rank, window) for rank in range(4))
        assert forward_flops(4096, shape) == 4 * 128 * 32 * pairs
    assert forward_flops(50, replace(SHAPE, window=100)) == forward_flops(50, SHAPE)


def test_a_window_sends_the_keys_before_two_chunks() -> None:
    shape = replace(SHAPE, window=513)
    assert forward_time(8 * 4096, 8, shape, LINK).bytes_sent == pytest.approx(2 * 2 * 512 * 8 * 128 * 2)
    wide = replace(SHAPE, window=32000)
    assert forward_time(32768, 8, wide, LINK).bytes_sent == forward_time(32768, 8, SHAPE, LINK).bytes_sent


def test_one_gpu_waits_for_nobody() -> None:
    for time in (forward_time, backward_time):
        alone = time(8192, 1, SHAPE, LINK)
        assert alone.exposed == 0
        assert alone.bytes_sent == 0
        assert alone.efficiency == 1


def test_time_falls_with_the_number_of_gpus_where_transfers_hide() -> None:
    alone, eight = forward_time(262144, 1, SHAPE, LINK), forward_time(262144, 8, SHAPE, LINK)
    assert alone.seconds == pytest.approx(8 * eight.seconds)
    slow = forward_time(262144, 8, SHAPE, replace(LINK, bandwidth=1e9))
    assert slow.seconds == pytest.approx(eight.compute / 8 + slow.bytes_sent / 1e9)


def test_splitting_heads_copies_the_kv_heads_that_conversion_saved() -> None:
    assert ulysses_copies(32, 8, 8) == 1
    assert ulysses_copies(32, 8, 4) == 1
    assert ulysses_copies(32, 2, 8) == 4
    assert ulysses_copies(32, 1, 8) == 8
    assert ulysses_copies(9, 3, 2) is None
    assert ulysses_copies(12, 3, 2) is None


def test_a_ring_sends_less_than_split_heads_where_there_are_few_kv_heads() -> None:
    """n = 1000 of 8 ranks, D = 128, bfloat16: 7/8 of 2 (32 + 8) heads against 7 x 2 K."""
    assert ulysses_bytes(8000, 8, SHAPE) == pytest.approx(7 / 8 * 80 * 1000 * 128 * 2)
    assert forward_time(8000, 8, SHAPE, LINK).bytes_sent == 7 * 16 * 1000 * 128 * 2
    single = replace(SHAPE, kv_heads=1)
    assert ulysses_bytes(8000, 8, single) == ulysses_bytes(8000, 8, SHAPE)
    assert forward_time(8000, 8, single, LINK).bytes_sent == 7 * 2 * 1000 * 128 * 2
    with pytest.raises(ValueError, match="9 query and 3 KV heads"):
        ulysses_bytes(8000, 2, replace(SHAPE, heads=9, kv_heads=3))
