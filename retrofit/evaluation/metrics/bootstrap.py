"""95% intervals by the percentile bootstrap (Efron 1979), numpy only.

Perplexity is exp(sum of losses / tokens), so a resample needs only the sum and the token count of each unit. The unit
is the document from five documents on. With fewer it is a block of consecutive tokens within a document, the longest of
512, 256, ... 1 tokens that gives at least eight blocks; such an interval speaks about these documents, not others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_DOCUMENTS = 5
_MIN_BLOCKS = 8
_DRAWN = 1 << 20  # units drawn at a time: what is drawn does not depend on it, memory does
_BLOCKS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Interval:
    """value: the statistic on all units. low, high: its 95% interval. unit: what was resampled. units: how many."""

    value: float
    low: float
    high: float
    unit: str
    units: int


def perplexity_interval(losses: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Interval of exp(mean loss). losses: one array of token losses per document."""
    sums, counts, unit = _units(losses)
    return _interval(sums, counts, unit, resamples, seed)


def ratio_interval(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of ppl(a) / ppl(b) on the same tokens, paired: a resample takes the same units of both."""
    assert len(a) == len(b) and all(x.shape == y.shape for x, y in zip(a, b, strict=True)), "not the same tokens"
    differences = [np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in zip(a, b, strict=True)]
    sums, counts, unit = _units(differences)
    return _interval(sums, counts, unit, resamples, seed)


def difference_interval(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of mean(a - b) in nats on the same tokens, paired: a resample takes the same units of both."""
    ratio = ratio_interval(a, b, resamples=resamples, seed=seed)
    value, low, high = (float(np.log(number)) for number in (ratio.value, ratio.low, ratio.high))
    return Interval(value, low, high, ratio.unit, ratio.units)


def bits_ratio_interval(
    a: np.ndarray, b: np.ndarray, nbytes: np.ndarray, unit: str, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of bits(a) / bits(b) on the same bytes, paired. a, b: nats of each unit; nbytes: its bytes."""
    assert a.shape == b.shape == nbytes.shape and len(a), "not the same units"
    draws = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
    low, high = np.percentile(a[draws].sum(1) / b[draws].sum(1), [2.5, 97.5])
    return Interval(float(a.sum() / b.sum()), float(low), float(high), unit, len(a))


def mean_interval(values: np.ndarray, unit: str, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Interval of the mean of `values`, one for each unit. A resample is drawn as how often each distinct value comes:
    right and wrong answers are few values and many units."""
    assert len(values), "no values"
    distinct, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.percentile(draws @ distinct / len(values), [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high), unit, len(values))


def _units(losses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, str]:
    """(sum of losses, token count) of every unit, and what the unit is."""
    arrays = [np.asarray(array, np.float64) for array in losses if len(array)]
    assert arrays, "no losses"
    unit = "document"
    if len(arrays) < MIN_DOCUMENTS:
        length = next((n for n in _BLOCKS if sum(-(-len(a) // n) for a in arrays) >= _MIN_BLOCKS), _BLOCKS[-1])
        arrays = [a[start : start + length] for a in arrays for start in range(0, len(a), length)]
        unit = f"block of {length} tokens"
    return np.array([a.sum() for a in arrays]), np.array([float(len(a)) for a in arrays]), unit


def _interval(sums: np.ndarray, counts: np.ndarray, unit: str, resamples: int, seed: int) -> Interval:
    units, generator = len(sums), np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, rows := max(1, _DRAWN // units)):
        draws = generator.integers(units, size=(min(rows, resamples - start), units))
        means[start : start + rows] = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(np.exp(sums.sum() / counts.sum()))
    return Interval(value, float(np.exp(low)), float(np.exp(high)), unit, units)
