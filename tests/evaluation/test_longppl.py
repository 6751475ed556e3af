"""ContextGain, LongPPL and effective length on losses made up so that the answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from retrofit.errors import UserError
from retrofit.evaluation.metrics.bootstrap import bits_ratio_interval, difference_interval
from retrofit.evaluation.metrics.effective import (
    AGAINST_NATIVE,
    AGAINST_ORIGINAL,
    NEEDLE_SHARE,
    certificate,
    effective_length,
    short_context,
    yardstick,
)
from retrofit.evaluation.metrics.longppl import context_gains, key_tokens, long_ppl, native_windows, short_windows
from retrofit.evaluation.scoring.losses import TokenLosses
from tests.evaluation.test_perplexity import made_up

NATIVE, LENGTHS = 64, (32, 64, 128, 256)


def shifted(losses: TokenLosses, by: float, start: int, stop: int | None = None) -> TokenLosses:
    """The same losses, `by` nats higher from loss `start` on."""
    arrays = [array.copy() for array in losses.losses]
    for array in arrays:
        array[start:stop] += by
    return replace(losses, losses=tuple(arrays))


def test_a_difference_is_that_of_the_means_and_paired() -> None:
    losses = made_up(6, 200)
    found = difference_interval([a + 0.25 for a in losses.losses], losses.losses)
    assert found.value == pytest.approx(0.25, abs=1e-6)
    assert found.high - found.low < 1e-5


def test_context_gain_is_the_mean_difference_on_the_same_tokens() -> None:
    full = made_up(6, 256)
    short = shifted(full, 0.3, 127)  # the tokens at positions 128 to 255 lose 0.3 nats without their context
    found = context_gains(full, short, NATIVE, (*LENGTHS, 72), size=16, resamples=200)
    rows = {(row.kind, row.length): row for row in found}
    assert {length for _, length in rows} == {72, 128, 256}
    assert rows["all", 128].gain == 0
    assert rows["all", 128].tokens == 6 * 16
    assert rows["all", 72].tokens == 6 * 8  # no more than stand beyond the native length
    last = rows["all", 256]
    assert last.gain == pytest.approx(0.3, abs=1e-6)
    assert last.low > 0
    assert last.tokens == 6 * 16
    assert rows["a", 256].tokens == 3 * 16
    expected = np.mean([s[-16:] - f[-16:] for s, f in zip(short.losses, full.losses, strict=True)])
    assert last.gain == pytest.approx(float(expected), abs=1e-6)


def test_what_a_text_gives_within_the_native_length_stands_beside_what_it_gives_beyond() -> None:
    full = flat()
    half = context_gains(full, shifted(full, 0.2, 31), NATIVE // 2, (NATIVE,), size=16)
    within = next(row for row in half if row.kind == "all")
    assert (within.context, within.length, within.tokens) == (32, 64, 6 * 16)
    beyond = [row for row in context_gains(full, shifted(full, -0.3, 63), NATIVE, LENGTHS, size=16)]
    gains = [row for row in (*half, *beyond) if row.kind == "all"]
    found = effective_length(full, LENGTHS, NATIVE, size=16, gains=gains, within=within)
    assert found.length == 64
    assert "128 tokens: more context harms (-0.3000 nats" in found.stopped_by
    assert found.tests[1].gain is None
    said = "From 32 to 64 tokens of the same texts the model gains +0.2000 nats (+0.2000 to +0.2000)."
    assert yardstick(found) == said
    assert said in certificate(found)
    nothing = replace(found, within=replace(within, gain=0.01, low=-0.01, high=0.03))
    assert "can hardly be shown to help" in yardstick(nothing)
    blind = [replace(row, low=-0.4, high=0.1) for row in gains]
    unsure = effective_length(full, LENGTHS, NATIVE, size=16, gains=blind)
    assert "128 tokens: more context is not shown to help" in unsure.stopped_by
    assert yardstick(unsure) == ""


def test_windows_of_the_two_passes_promise_their_context() -> None:
    moving = native_windows(64, LENGTHS, 16)
    spans = list(moving.spans(256))
    assert [(span.first, span.stop) for span in spans] == [
        (n, n + 4) for end in (128, 256) for n in range(end - 16, end, 4)
    ]
    assert all(60 <= token - span.begin < 64 for span in spans for token in range(span.first, span.stop))
    assert moving.cost(256) == 8 * 64
    assert not list(moving.spans(100))
    assert [span.first for span in native_windows(64, (70,), 16).spans(70)] == [64, 68]
    span = list(short_windows(4096).spans(10_000))[1]
    assert (span.first - span.begin, span.stop - span.begin) == (4096, 5120)  # what the authors' code reads


def test_key_tokens_follow_their_definition() -> None:
    full = [np.array([1.0, 1.0, 1.99, 2.0, 0.5])]
    short = [np.array([3.0, 3.01, 4.5, 5.0, 2.4])]
    assert key_tokens(full, short)[0].tolist() == [False, True, True, False, False]


def test_long_ppl_is_the_perplexity_of_the_key_tokens() -> None:
    full = made_up(2, 256)
    short = shifted(full, 3.0, 100)
    (row, *_) = [r for r in long_ppl(full, short, (64, 256), short_context=64) if r.kind == "all"]
    arrays = [a[100:][a[100:] < 2] for a in full.losses]
    assert row.length == 256
    assert row.key_tokens == sum(map(len, arrays)) >= 20
    assert row.ppl == pytest.approx(math.exp(np.concatenate(arrays).mean(dtype=np.float64)), rel=1e-6)
    assert row.low < row.ppl < row.high
    other = shifted(full, 3.0, 200)
    (chosen, *_) = [
        r for r in long_ppl(full, short, (256,), short_context=64, evaluator=(full, other)) if r.kind == "all"
    ]
    assert chosen.key_tokens < row.key_tokens
    (none, *_) = [r for r in long_ppl(full, full, (256,), short_context=64) if r.kind == "all"]
    assert none.key_tokens == 0
    assert none.ppl is None
    assert none.low is None


def flat(documents: int = 6) -> TokenLosses:
    rng = np.random.default_rng(0)
    made = made_up(documents, 256)
    arrays = tuple((1.5 + 0.1 * rng.standard_normal(255)).astype(np.float32) for _ in range(documents))
    return replace(made, losses=arrays)


def test_effective_length_needs_every_test_at_every_shorter_length() -> None:
    full = flat()
    gains = [row for row in context_gains(full, shifted(full, 0.3, 63), NATIVE, LENGTHS, size=16) if row.kind == "all"]
    needle = {32: 1.0, 64: 0.9, 128: 0.9, 256: 0.8}
    found = effective_length(full, LENGTHS, NATIVE, size=16, gains=gains, needle=needle)
    assert found.length == 256
    assert found.stopped_by is None
    assert found.not_tested == ()
    assert found.tests[-1].margins["gain"] > 0.29
    assert found.tests[-1].needle_bound == pytest.approx(0.9 * NEEDLE_SHARE)
    assert found.tests[-1].margins["needle"] == pytest.approx(0.8 - 0.9 * NEEDLE_SHARE)

    worse = shifted(full, 0.2, 100, 127)  # the tail at 128 only: 256 passes and does not count
    stopped = effective_length(worse, LENGTHS, NATIVE, size=16, gains=gains, needle=needle)
    assert stopped.length == 64
    assert "128 tokens: the tail is not shown" in stopped.stopped_by
    assert stopped.tests[2].margins["tail"] < 0
    assert stopped.tests[3].tail_passed

    blind = [replace(row, low=-0.01) if row.length == 256 else row for row in gains]
    assert effective_length(full, LENGTHS, NATIVE, size=16, gains=blind, needle=needle).length == 128
    lost = effective_length(full, LENGTHS, NATIVE, size=16, gains=gains, needle={**needle, 256: 0.1})
    assert lost.length == 128
    assert "needle" in lost.stopped_by


def test_a_text_that_gets_harder_does_not_stop_a_model_that_uses_it() -> None:
    harder = shifted(flat(1), 0.5, 100)  # one document, whose end any model would predict worse
    near = shifted(harder, 0.3, 63)  # with the native context every token beyond it costs more
    broken = shifted(harder, 5.0, 64)  # the original with all of the context
    gains = [row for row in context_gains(harder, near, NATIVE, LENGTHS, size=16) if row.kind == "all"]
    found = effective_length(harder, LENGTHS, NATIVE, size=16, original=(broken, near), gains=gains)
    assert found.length == 256
    assert found.control == AGAINST_ORIGINAL
    assert found.tests[-1].tail == pytest.approx(math.exp(-0.3), rel=1e-3)
    assert found.tests[0].tail is None
    before = effective_length(broken, LENGTHS, NATIVE, size=16, original=(broken, near))
    assert before.length == 64

    # Worse everywhere by as much is not worse at length; a tail that the original predicts better is.
    evenly = shifted(harder, 0.2, 0)
    assert effective_length(evenly, LENGTHS, NATIVE, size=16, original=(broken, near), gains=gains).length == 256
    lost = shifted(harder, 0.5, 230)
    stopped = effective_length(lost, LENGTHS, NATIVE, size=16, original=(broken, near), gains=gains)
    assert stopped.length == 128
    assert "256 tokens: the tail is not shown" in stopped.stopped_by


def test_needles_that_are_not_found_within_the_native_length_say_nothing_beyond_it() -> None:
    full = flat()
    found = effective_length(full, LENGTHS, NATIVE, size=16, needle=dict.fromkeys(LENGTHS, 0.2))
    assert found.length == 256
    assert found.tests[-1].needle_passed is None
    assert (
        found.not_tested[-1]
        == "the needle against that within the native length (the model finds 0.20 of the needles there)"
    )


def test_one_document_without_the_native_context_shows_nothing_beyond_it() -> None:
    found = effective_length(flat(1), LENGTHS, NATIVE, size=16, needle=dict.fromkeys(LENGTHS, 1.0))
    assert found.length == 64
    assert found.control == ""
    assert found.tests[-1].tail is None
    assert "no test on text was made" in found.stopped_by
    assert found.not_tested == ("tail at 128, 256", "context gain at 128, 256")


def test_a_certificate_says_what_was_not_tested() -> None:
    found = effective_length(flat(), (32, 128), NATIVE, size=16)
    assert found.length == 128
    assert found.control == AGAINST_NATIVE
    assert found.not_tested[0].startswith("the native length, 64, was not measured")
    assert found.not_tested[1:] == ("context gain at 128", "needle at 128")


def test_short_context_is_paired_and_stops_at_the_native_length() -> None:
    before = made_up(6, 256)
    rows = short_context(before, shifted(before, 0.01, 0), LENGTHS, NATIVE)
    assert [row.length for row in rows] == [32, 64]
    assert rows[0].ratio == pytest.approx(math.exp(0.01), rel=1e-5)
    assert rows[0].high - rows[0].low < 1e-5


def test_bits_are_paired() -> None:
    rng = np.random.default_rng(0)
    nats, nbytes = rng.gamma(2, 1, 50), rng.integers(10, 90, 50)
    found = bits_ratio_interval(1.1 * nats, nats, nbytes, "block")
    assert found.value == pytest.approx(1.1)
    assert found.high - found.low < 1e-9


def test_a_length_that_was_not_scored_is_refused() -> None:
    with pytest.raises(UserError, match="at 512 tokens"):
        made_up(2, 256).at(512)
