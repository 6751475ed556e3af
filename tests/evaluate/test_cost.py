"""Decode cost: the cache is measured, not computed."""

from __future__ import annotations

import pytest

from retrofit.errors import UserError
from retrofit.evaluate.cost import decode_speed
from retrofit.model.families import describe
from tests.tiny import tiny_model


def test_measured_cache_bytes_equal_the_formula() -> None:
    for kv_heads in (4, 1):
        model = tiny_model("llama", num_key_value_heads=kv_heads)
        cost = decode_speed(model, 16, 4, repeats=3)
        assert cost.kv_bytes_per_token == describe(model.config).kv_bytes_per_token(4)
        assert cost.kv_tokens == 20 and len(cost.runs) == 3 and cost.tokens_per_s == sorted(cost.runs)[1] > 0
        assert cost.kernel == "eager" and cost.dtype == "float32"


def test_a_window_holds_the_cache_down() -> None:
    cost = decode_speed(tiny_model("mistral", sliding_window=8), 16, 4, repeats=1)
    assert cost.kv_bytes == 2 * 2 * 4 * 16 * 4 * 7  # layers, k and v, KV heads, head dim, bytes, window - 1 tokens


def test_nothing_to_decode_is_refused() -> None:
    with pytest.raises(UserError):
        decode_speed(tiny_model("llama"), 16, 0)
