"""The cost of running: the cache is measured, not computed, and the bounds follow from counted bytes and operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrofit.errors import UserError
from retrofit.evaluation import cost as costs
from retrofit.evaluation.cost import (
    Speeds,
    prefill_flops,
    run_cost,
    side_by_side,
    weights_read,
)
from retrofit.evaluation.running import LengthCost, RunCost, decoding_change
from retrofit.model.families import describe
from retrofit.system.memory import Watch
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def machine_of_round_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "flops", lambda dtype, device: 1e9)
    monkeypatch.setattr(costs, "bandwidth", lambda device: 1e9)


def test_measured_cache_bytes_equal_the_formula() -> None:
    for kv_heads in (4, 1):
        model = tiny_model("llama", num_key_value_heads=kv_heads)
        cost = run_cost(model, [16, 32], 4)
        for one, tokens in zip(cost.lengths, (16, 32), strict=True):
            assert one.length == tokens
            assert one.kv_bytes == one.kv_bytes_expected
            assert one.kv_bytes == tokens * describe(model.config).kv_bytes_per_token(4)
            assert one.prefill_per_s == pytest.approx(tokens / one.prefill_seconds)
            assert one.decode_per_s > 0
            assert one.decode_bound == pytest.approx(1e9 / (cost.weight_bytes + one.kv_bytes))
        assert cost.kernel == "eager"
        assert cost.dtype == "float32"
        assert cost.device == "cpu"


def test_models_have_their_turn_and_every_round_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    speeds: list[Speeds] = []
    # (prefill seconds, decoded tokens a second) of a, b, a, b, a, b at two lengths
    times = [[(4.0, 10.0), (9.0, 8.0)], [(1.0, 5.0), (2.0, 4.0)], [(3.0, 9.0), (9.5, 8.5)], [(1.5, 6.0), (1.8, 3.0)],
             [(3.5, 2.0), (9.1, 8.2)], [(9.9, 5.5), (1.9, 3.5)]]  # fmt: skip

    def fake(name: str) -> Callable[[], Any]:
        return lambda: SimpleNamespace(name=name, dtype=torch.float32, device=torch.device("cpu"))

    def measured_speeds(dtype: torch.dtype, device: str) -> Speeds:
        speeds.append(Speeds(1.0, 1.0))
        return speeds[-1]

    def measured(model: Any, lengths: list[int], decode_tokens: int, *, speeds: Speeds, **_: object) -> RunCost:
        found = [
            LengthCost(n, prefill, n / prefill, 1.0, 0, 0, 0, decode_tokens, decode, 1.0, (prefill,), (decode,))
            for n, (prefill, decode) in zip(lengths, times[len(turns)], strict=True)
        ]
        turns.append(model.name)
        return RunCost(tuple(found), 0, "eager", "float32", "cpu", 1.0, 1.0)

    monkeypatch.setattr(costs, "run_cost", measured)
    monkeypatch.setattr(costs, "machine_speeds", measured_speeds)
    found = side_by_side({"a": fake("a"), "b": fake("b")}, [8, 16], 4, rounds=3)
    assert turns == ["a", "b"] * 3
    assert len(speeds) == 1
    seen = {label: [(one.prefill_seconds, one.decode_per_s) for one in cost.lengths] for label, cost in found.items()}
    assert seen == {"a": [(3.5, 9.0), (9.1, 8.2)], "b": [(1.5, 5.5), (1.9, 3.5)]}
    assert found["a"].lengths[0].prefill_per_s == 8 / 3.5
    assert found["a"].lengths[0].decode_rounds == (10.0, 9.0, 2.0)
    assert found["b"].lengths[1].prefill_rounds == (2.0, 1.8, 1.9)


def decoded(*rounds: float, length: int = 8) -> LengthCost:
    return LengthCost(length, 1.0, 8.0, 1.0, 0, 0, 0, 4, rounds[0], 1.0, (1.0,), rounds)


def test_speeds_are_compared_where_the_rounds_tell_the_models_apart() -> None:
    change = decoding_change(decoded(10.0, 10.5, 10.2), decoded(13.0, 12.5, 12.8))
    assert change is not None
    assert (change.ratio, change.low, change.high) == pytest.approx((12.8 / 10.2, 12.5 / 10.5, 13.0 / 10.0))
    slower = decoding_change(decoded(13.0, 12.5, 12.8), decoded(10.0, 10.5, 10.2))
    assert slower is not None
    assert slower.ratio < slower.high < 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3.4, 20.0, 19.0, 3.5), (20.0, 19.9, 20.1, 20.2)),  # half of one model's rounds beside other work: 5.9 times
        ((3.0, 12.0, 11.0), (12.5, 13.0, 60.0)),  # apart, but rounds of one model differ by more than the two models
        ((10.0, 10.1), (20.0, 20.1)),  # two rounds
        ((), ()),
    ],
)
def test_rounds_that_disagree_give_no_factor(before: tuple[float, ...], after: tuple[float, ...]) -> None:
    old, new = (decoded(*rounds) if rounds else replace(decoded(1.0), decode_rounds=()) for rounds in (before, after))
    assert decoding_change(old, new) is None


def test_speeds_at_two_lengths_are_not_compared() -> None:
    assert decoding_change(decoded(1.0, 1.0, 1.0), decoded(2.0, 2.0, 2.0, length=16)) is None


def test_a_window_holds_the_cache_down() -> None:
    (cost,) = run_cost(tiny_model("mistral", sliding_window=8), [16], 4).lengths
    assert cost.kv_bytes == 2 * 2 * 4 * 16 * 4 * 7  # layers, k and v, KV heads, head dim, bytes, window - 1 tokens
    assert cost.kv_bytes_expected == 2 * 2 * 4 * 16 * 4 * 8


def test_lengths_are_cut_to_the_window_and_measured_once() -> None:
    model = tiny_model("llama")
    window = model.config.max_position_embeddings
    cost = run_cost(model, [8, 10 * window, 20 * window], 0)
    assert [one.length for one in cost.lengths] == [8, window]
    assert all(one.decode_per_s is None and one.decode_bound > 0 for one in cost.lengths)


def test_what_is_decoded_lies_within_learned_positions() -> None:
    model = tiny_model("gpt_bigcode")
    window = model.config.max_position_embeddings
    (cost,) = run_cost(model, [window], 4).lengths
    assert cost.length == window - 4
    assert cost.decode_per_s is not None


@pytest.mark.parametrize("tied", [True, False])
def test_operations_and_bytes_are_those_of_the_matrices(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    spec, tokens = describe(model.config), 10
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    head = model.lm_head.weight.numel()
    assert weights_read(model) == 4 * (sum(m.weight.numel() for m in linear) + norms + head)
    scores = sum(4 * layer.query_heads * layer.head_dim * tokens * (tokens + 1) / 2 for layer in spec.layers)
    expected = 2 * tokens * (sum(m.weight.numel() for m in linear) + norms) + 2 * head + scores
    assert prefill_flops(model, spec, tokens) == pytest.approx(expected)


def test_a_window_saves_operations() -> None:
    full, cut = (tiny_model("mistral", sliding_window=window) for window in (None, 8))
    more, less = (prefill_flops(model, describe(model.config), 32) for model in (full, cut))
    layer = describe(cut.config).layers[0]
    pairs = 32 * 33 / 2 - (8 * 9 / 2 + 24 * 8)
    assert more - less == pytest.approx(2 * 4 * layer.query_heads * layer.head_dim * pairs)


def test_memory_is_seen_while_it_is_held() -> None:
    with Watch(torch.device("cpu")) as watch:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        held += 1
        while watch.most_bytes < 60 << 20:  # however long another process keeps the watching thread from looking
            time.sleep(0.001)
        del held
    assert 60 << 20 < watch.most_bytes < 200 << 20


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(UserError):
        run_cost(tiny_model("llama"), [0], 4)
