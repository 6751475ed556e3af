"""Effective length: the longest context that a model is shown to use, and the tests that show it.

A length counts when it and every shorter measured one pass what can be asked of them: the tail of the text is predicted
no worse than at the native length, the context beyond the native one helps on the same tokens, and the needle is found
about as often as within the native length. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.evaluate.bootstrap import ratio_interval
from retrofit.evaluate.perplexity import prefix_ppl, tail

if TYPE_CHECKING:
    from retrofit.evaluate.longppl import ContextGain
    from retrofit.evaluate.losses import TokenLosses

NEEDLE_SHARE = 0.85  # of the score at the native length that a longer one must keep


@dataclass(frozen=True)
class LengthTests:
    """The tests of one length. A test that was not made is None; it neither passes nor fails.

    tail: TailPPL(L) / TailPPL(native) [low, high], paired by document; passes unless its whole interval lies above 1.
    gain: ContextGain(L) in nats [low, high], beyond the native length only; passes when its interval lies above 0.
    needle: score at L; passes from `needle_bound` on. margins: how far each passed (or, below 0, failed): nats for tail
    (-ln low) and gain (low), score for the needle.
    """

    length: int
    tail: float
    tail_low: float
    tail_high: float
    tail_passed: bool
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    gain_passed: bool | None
    needle: float | None
    needle_bound: float | None
    needle_passed: bool | None
    margins: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Every test that was made passed."""
        return self.tail_passed and self.gain_passed is not False and self.needle_passed is not False


@dataclass(frozen=True)
class EffectiveLength:
    """length: the effective one, 0 when not even the shortest passed. native: what the original was made for.

    tests: of every measured length up to the longest, the certificate. not_tested: what was never looked at, in words;
    a certificate with an entry here is worth less. stopped_by: the first length that failed and its failed tests.
    """

    length: int
    native: int
    tail: int
    unit: str
    documents: int
    tests: tuple[LengthTests, ...]
    not_tested: tuple[str, ...]
    stopped_by: str | None


def effective_length(
    losses: TokenLosses,
    lengths: Sequence[int],
    native: int,
    *,
    size: int,
    gains: Sequence[ContextGain] = (),
    needle: Mapping[int, float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> EffectiveLength:
    """The certificate of one model.

    lengths: those measured. native: the length TailPPL is compared with; the longest measured one that is not above it
    is taken, or the shortest of all. size: tokens of a tail. gains: rows of all documents (kind `all`), by length.
    needle: score in [0, 1] by length.
    """
    measured = sorted(set(lengths))
    reference = max((n for n in measured if n <= native), default=measured[0])
    base = tail(losses.at(reference), reference, size)
    by_length = {row.length: row for row in gains}
    bound = _needle_bound(needle, native)
    tests: list[LengthTests] = []
    unit = ""
    for length in measured:
        short = min(size, length - 1, reference - 1)
        ends = [array[-short:] for array in losses.at(length)]
        found = ratio_interval(ends, [array[-short:] for array in base], resamples=resamples, seed=seed)
        unit = found.unit
        row, score = by_length.get(length), (needle or {}).get(length)
        margins = {"tail": -math.log(found.low)}
        if row is not None:
            margins["gain"] = row.low
        if score is not None and bound is not None:
            margins["needle"] = score - bound
        tests.append(
            LengthTests(
                length=length,
                tail=found.value,
                tail_low=found.low,
                tail_high=found.high,
                # A shorter text has had less context; only beyond the native length can the tail have got worse.
                tail_passed=length <= reference or found.low <= 1.0,
                gain=row.gain if row else None,
                gain_low=row.low if row else None,
                gain_high=row.high if row else None,
                gain_passed=row.low > 0 if row else None,
                needle=score,
                needle_bound=bound if score is not None else None,
                needle_passed=score >= bound if score is not None and bound is not None else None,
                margins=margins,
            )
        )
    good = 0
    failed: LengthTests | None = None
    for test in tests:
        if not test.passed:
            failed = test
            break
        good = test.length
    return EffectiveLength(
        length=good,
        native=native,
        tail=size,
        unit=unit,
        documents=len(losses.documents),
        tests=tuple(tests),
        not_tested=tuple(_not_tested(tests, native, reference)),
        stopped_by=_why(failed) if failed else None,
    )


def certificate(found: EffectiveLength) -> str:
    """What shows the effective length, and what it does not show, in words."""
    good = next((test for test in found.tests if test.length == found.length), None)
    said = []
    if good is None:
        said.append("No measured length passed every test.")
    else:
        shorter = [test.length for test in found.tests if test.length < good.length]
        also = f"; so do all shorter measured ones ({', '.join(f'{n:,}' for n in shorter)})" if shorter else ""
        said.append(f"{good.length:,} tokens pass: {_and(_passed(good, found))}{also}.")
    if found.stopped_by:
        said.append(f"Not beyond, at {found.stopped_by}.")
    elif found.tests:
        said.append(f"It was the longest of {len(found.tests)} measured.")
    if found.not_tested:
        said.append(f"Not tested: {'; '.join(found.not_tested)}.")
    return " ".join(said)


def _passed(test: LengthTests, found: EffectiveLength) -> list[str]:
    reasons = []
    if test.length > found.native:
        reasons.append(
            f"the last {found.tail:,} tokens have {test.tail:.3f} times the perplexity at the native length "
            f"({test.tail_low:.3f} to {test.tail_high:.3f})"
        )
    if test.gain is not None:
        reasons.append(
            f"context beyond {found.native:,} tokens saves {test.gain:.4f} nats a token on the same tokens "
            f"({test.gain_low:.4f} to {test.gain_high:.4f})"
        )
    if test.needle is not None:
        needed = f", {test.needle_bound:.2f} are needed" if test.needle_bound is not None else ""
        reasons.append(f"{test.needle:.2f} of the needle's tokens are found{needed}")
    return reasons or [f"it lies within the native length of {found.native:,}"]


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


@dataclass(frozen=True)
class ShortContext:
    """What a change cost at or below the native length: ppl(after) / ppl(before) [low, high] on the same tokens."""

    length: int
    tokens: int
    before: float
    after: float
    ratio: float
    low: float
    high: float
    unit: str


def short_context(
    before: TokenLosses,
    after: TokenLosses,
    lengths: Sequence[int],
    native: int,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> list[ShortContext]:
    """The regression at every measured length up to `native`, paired token by token."""
    rows = []
    for length in sorted(n for n in set(lengths) if n <= native):
        old, new = before.at(length), after.at(length)
        found = ratio_interval(new, old, resamples=resamples, seed=seed)
        tokens = sum(len(array) for array in new)
        old_ppl, new_ppl = prefix_ppl(old, length), prefix_ppl(new, length)
        rows.append(ShortContext(length, tokens, old_ppl, new_ppl, found.value, found.low, found.high, found.unit))
    return rows


def _needle_bound(needle: Mapping[int, float] | None, native: int) -> float | None:
    """The score to keep: a share of that at the longest measured length within the native one (or the shortest)."""
    if not needle:
        return None
    return NEEDLE_SHARE * needle[max((n for n in needle if n <= native), default=min(needle))]


def _not_tested(tests: Sequence[LengthTests], native: int, reference: int) -> list[str]:
    found = []
    if reference != native:
        found.append(f"the native length, {native}, was not measured; {reference} stands for it")
    beyond = [test for test in tests if test.length > native]
    for name, missing in (
        ("context gain", [test.length for test in beyond if test.gain is None]),
        ("needle", [test.length for test in tests if test.needle is None]),
    ):
        if missing:
            found.append(f"{name} at {', '.join(map(str, missing))}")
    return found


def _why(test: LengthTests) -> str:
    reasons = []
    if not test.tail_passed:
        reasons.append(
            f"the tail is predicted worse ({test.tail:.3f} times the perplexity, at least {test.tail_low:.3f})"
        )
    if test.gain_passed is False:
        reasons.append(
            f"more context does not help ({test.gain:+.4f} nats, {test.gain_low:+.4f} to {test.gain_high:+.4f})"
        )
    if test.needle_passed is False:
        reasons.append(f"the needle is found less often ({test.needle:.2f}, below {test.needle_bound:.2f})")
    return f"{test.length} tokens: {'; '.join(reasons)}"
