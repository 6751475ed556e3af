"""Effective length: the longest context that a model is shown to use, and the tests that show it.

Up to the native length a window is taken as given. A longer length counts when it and every shorter measured one pass
what can be asked of them: the tail of the text is predicted about as well as at the native length, the context beyond
the native one helps on the same tokens, and the needle is found about as often as within the native length. numpy only.

The tokens before L and those before the native length are different ones, and a text may simply get harder. So what is
compared is how much more the model loses on either than the original model, which reads them with its native context:
r(L) = mean(loss with context L - original's loss with the native context), and the tail's ratio is exp(r(L) -
r(native)). Without the original's losses TailPPL(L) / TailPPL(native) is taken over five documents or more; fewer say
nothing of the model, and the test counts as not made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.evaluation.metrics.bootstrap import MIN_DOCUMENTS, ratio_interval
from retrofit.evaluation.metrics.longppl import ContextGain
from retrofit.evaluation.metrics.perplexity import perplexity, tail
from retrofit.format import enumerated

if TYPE_CHECKING:
    import numpy as np

    from retrofit.evaluation.scoring.losses import TokenLosses

TAIL_MARGIN = 0.05  # how much worse the tail may be predicted
NEEDLE_SHARE = 0.85  # of the score at the native length that a longer one must keep
NEEDLE_FOUND = 0.5  # score at the native length below which longer ones say nothing
AGAINST_ORIGINAL = "that of the original, which reads the same tokens with its native context"
AGAINST_NATIVE = "that of the last tokens before the native length, over the same documents"


@dataclass(frozen=True)
class LengthTests:
    """The tests of one length. A test that was not made is None; it neither passes nor fails.

    beyond: whether the length is above the native one; only then tail and gain are tested. tail: how much worse the
    tail is predicted than at the native length [low, high], 1 if as well; passes when its whole interval lies below 1 +
    TAIL_MARGIN. gain: ContextGain(L) in nats [low, high]; passes when its interval lies above 0. needle: score at L;
    passes from `needle_bound` on. margins: how far each passed (or, below 0, did not): nats for tail and gain, score
    for the needle.
    """

    length: int
    beyond: bool
    tail: float | None
    tail_low: float | None
    tail_high: float | None
    tail_passed: bool | None
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
        """Every test that was made passed, and beyond the native length one on text was made."""
        made = [passed for passed in (self.tail_passed, self.gain_passed) if passed is not None]
        return all(made) and self.needle_passed is not False and bool(made or not self.beyond)


@dataclass(frozen=True)
class EffectiveLength:
    """length: the effective one, 0 when not even the shortest passed. native: what the original was made for.

    tail: tokens of a tail. control: what it is set against, empty where it was not tested. tests: of every measured
    length up to the longest, the certificate. not_tested: what was never looked at, in words;
    a certificate with an entry here is worth less. stopped_by: the first length that failed and its failed tests.
    within: what the original, or the model itself where it stands alone, gains from the second half of its own native
    context on the same documents: what there is to gain.
    """

    length: int
    native: int
    tail: int
    control: str
    unit: str
    documents: int
    tests: tuple[LengthTests, ...]
    not_tested: tuple[str, ...]
    stopped_by: str | None
    within: ContextGain | None = None


def effective_length(
    losses: TokenLosses,
    lengths: Sequence[int],
    native: int,
    *,
    size: int,
    original: tuple[TokenLosses, TokenLosses] | None = None,
    gains: Sequence[ContextGain] = (),
    needle: Mapping[int, float] | None = None,
    within: ContextGain | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> EffectiveLength:
    """The certificate of one model.

    lengths: those measured. native: the original's; where it was not measured, the longest below it stands for it.
    size: tokens of a tail. original: losses of the original on the same documents, with all of the context and under
    `native_windows(native, lengths, size)`. gains: rows of all documents (kind `all`), by length. needle: score in
    [0, 1] by length. within: as of `EffectiveLength`.
    """
    measured = sorted(set(lengths))
    reference = max((n for n in measured if n <= native), default=None)
    by_length = {row.length: row for row in gains if row.length > native}
    bound = _needle_bound(needle, native)
    tests: list[LengthTests] = []
    unit = ""
    for length in measured:
        ratio = None
        if reference is not None and length > native:
            pair = _tails(losses, original, length, native, reference, size)
            ratio = ratio_interval(*pair, resamples=resamples, seed=seed) if pair else None
        row, score = by_length.get(length), (needle or {}).get(length)
        margins: dict[str, float] = {}
        if ratio is not None:
            unit = ratio.unit
            margins["tail"] = math.log((1 + TAIL_MARGIN) / ratio.high)
        if row is not None:
            margins["gain"] = row.low
        if score is not None and bound is not None:
            margins["needle"] = score - bound
        tests.append(
            LengthTests(
                length=length,
                beyond=length > native,
                tail=ratio.value if ratio else None,
                tail_low=ratio.low if ratio else None,
                tail_high=ratio.high if ratio else None,
                tail_passed=ratio.high <= 1 + TAIL_MARGIN if ratio else None,
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
        control="" if not unit else AGAINST_NATIVE if original is None else AGAINST_ORIGINAL,
        unit=unit,
        documents=len(losses.documents),
        tests=tuple(tests),
        not_tested=tuple(_not_tested(tests, native, reference, needle)),
        stopped_by=_why(failed) if failed else None,
        within=within,
    )


def _tails(
    losses: TokenLosses,
    original: tuple[TokenLosses, TokenLosses] | None,
    length: int,
    native: int,
    reference: int,
    size: int,
) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """What is compared of the tails before `length` and before `reference`; None where it says nothing of the model."""
    short = min(size, length - native, reference - 1)
    long, base = (list(tail(losses.at(n), n, short)) for n in (length, reference))
    if original is not None:
        plain, near = original
        long = [a - b[length - 1 - short : length - 1] for a, b in zip(long, near.losses, strict=True)]
        base = [a - b for a, b in zip(base, tail(plain.at(reference), reference, short), strict=True)]
    return (long, base) if original is not None or len(long) >= MIN_DOCUMENTS else None


def certificate(found: EffectiveLength) -> str:
    """What shows the effective length, and what it does not show, in words."""
    good = next((test for test in found.tests if test.length == found.length), None)
    sentences = []
    if good is None:
        sentences.append("No measured length passed every test.")
    else:
        shorter = [test.length for test in found.tests if test.length < good.length]
        also = f"; so do all shorter measured ones ({', '.join(f'{n:,}' for n in shorter)})" if shorter else ""
        sentences.append(f"{good.length:,} tokens pass: {enumerated(_passed(good, found))}{also}.")
    if found.stopped_by:
        sentences.append(f"Not beyond, at {found.stopped_by}.")
    elif found.tests:
        sentences.append(f"It was the longest of {len(found.tests)} measured.")
    if found.within:
        sentences.append(yardstick(found))
    if found.not_tested:
        sentences.append(f"Not tested: {'; '.join(found.not_tested)}.")
    return " ".join(sentences)


def yardstick(found: EffectiveLength) -> str:
    """What the texts give a model that reads them within its native length, in words; "" where it was not measured."""
    row = found.within
    if row is None:
        return ""
    who = "the original" if found.control == AGAINST_ORIGINAL else "the model"
    nothing = (
        " That is not told from nothing: on so much of these texts a longer context can hardly be shown to help."
        if row.low <= 0
        else ""
    )
    return (
        f"From {row.context:,} to {row.length:,} tokens of the same texts {who} gains {row.gain:+.4f} nats "
        f"({row.low:+.4f} to {row.high:+.4f}).{nothing}"
    )


def _passed(test: LengthTests, found: EffectiveLength) -> list[str]:
    reasons = []
    if test.tail is not None:
        reasons.append(
            f"the last {found.tail:,} tokens are predicted as well as at the native length: {test.tail:.3f} times the "
            f"perplexity ({test.tail_low:.3f} to {test.tail_high:.3f}), set against {found.control}"
        )
    if test.gain is not None:
        reasons.append(
            f"context beyond {found.native:,} tokens saves {test.gain:.4f} nats a token on the same tokens "
            f"({test.gain_low:.4f} to {test.gain_high:.4f})"
        )
    if test.needle is not None:
        needed = f", {test.needle_bound:.2f} are needed" if test.needle_bound is not None else ""
        reasons.append(f"{test.needle:.2f} of the needle's tokens are found{needed}")
    return reasons or [f"it lies within the native length of {found.native:,}, which is taken as given"]


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
        old_ppl, new_ppl = perplexity(old), perplexity(new)
        rows.append(ShortContext(length, tokens, old_ppl, new_ppl, found.value, found.low, found.high, found.unit))
    return rows


def _needle_bound(needle: Mapping[int, float] | None, native: int) -> float | None:
    """The score to keep: a share of that at the longest measured length within the native one; None where the model
    finds too little there."""
    within = max((n for n in needle or {} if n <= native), default=None)
    if not needle or within is None or needle[within] < NEEDLE_FOUND:
        return None
    return NEEDLE_SHARE * needle[within]


def _not_tested(
    tests: Sequence[LengthTests], native: int, reference: int | None, needle: Mapping[int, float] | None
) -> list[str]:
    found = []
    if reference is None:
        found.append(f"nothing was measured within the native length, {native}")
    elif reference != native:
        found.append(f"the native length, {native}, was not measured; {reference} stands for it")
    beyond = [test for test in tests if test.length > native]
    for name, missing in (
        ("tail", [test.length for test in beyond if test.tail is None]),
        ("context gain", [test.length for test in beyond if test.gain is None]),
        ("needle", [test.length for test in beyond if test.needle is None]),
    ):
        if missing:
            found.append(f"{name} at {', '.join(map(str, missing))}")
    if needle and _needle_bound(needle, native) is None:
        within = max((n for n in needle if n <= native), default=None)
        why = f"the model finds {needle[within]:.2f} of the needles there" if within else "none was asked for there"
        found.append(f"the needle against that within the native length ({why})")
    return found


def _why(test: LengthTests) -> str:
    reasons = []
    if test.tail_passed is None and test.gain_passed is None and test.beyond:
        reasons.append(
            f"no test on text was made, which takes a pass with the native context (context_gain) or {MIN_DOCUMENTS} "
            "documents"
        )
    if test.tail_passed is False:
        reasons.append(
            "the tail is not shown to be predicted as well as at the native length "
            f"({test.tail:.3f} times the perplexity, "
            f"{test.tail_low:.3f} to {test.tail_high:.3f}; up to {1 + TAIL_MARGIN} passes)"
        )
    if test.gain_passed is False:
        harms = test.gain_high is not None and test.gain_high < 0
        reasons.append(
            f"more context {'harms' if harms else 'is not shown to help'} "
            f"({test.gain:+.4f} nats, {test.gain_low:+.4f} to {test.gain_high:+.4f})"
        )
    if test.needle_passed is False:
        reasons.append(f"the needle is found less often ({test.needle:.2f}, below {test.needle_bound:.2f})")
    return f"{test.length} tokens: {'; '.join(reasons)}"
