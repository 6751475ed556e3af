"""What a model loses by how frequent a token is. numpy only.

The few tokens that are most of a text, spaces and articles and brackets, come back first in a short training; what a
model knew stands in the rare ones. A mean over all tokens hides the second behind the first.

A token's rank is its place among the distinct tokens that are predicted in the texts of one kind, the most frequent
first; of tokens that are equally frequent the one with the smaller id goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from retrofit.evaluation.metrics.bootstrap import ratio_interval
from retrofit.evaluation.metrics.perplexity import ALL, perplexity
from retrofit.evaluation.scoring.losses import TokenLosses

EVERY = (1, None)
BANDS: tuple[tuple[int, int | None], ...] = (EVERY, (1, 10), (11, 100), (101, 1000), (1001, None))
"""First and last rank of each band; the first holds every token."""


@dataclass(frozen=True)
class FrequencyBand:
    """Perplexities of two models on the tokens of one kind of text whose rank lies in a band.

    length: context, the whole of which both models were made to read. first, last: ranks, the last included; None: to
    the rarest. before, after: perplexities of the two. ratio [low, high]: after / before with its paired 95% interval.
    """

    kind: str
    length: int
    first: int
    last: int | None
    tokens: int
    before: float
    after: float
    ratio: float
    low: float
    high: float
    unit: str

    @property
    def every(self) -> bool:
        """Whether it holds every token."""
        return (self.first, self.last) == EVERY


def shared_length(lengths: Iterable[int], windows: Iterable[int | None]) -> int | None:
    """The longest of `lengths` that all of the windows hold (None: one that is not known, which holds all); None where
    there is none."""
    smallest = min((window for window in windows if window is not None), default=None)
    return max((length for length in lengths if smallest is None or length <= smallest), default=None)


def by_frequency(
    before: TokenLosses, after: TokenLosses, length: int, *, resamples: int = 2000, seed: int = 0
) -> tuple[FrequencyBand, ...]:
    """The bands of every kind of text, then of all together (kind `all`); those that hold no token are left out.

    before, after: losses of two models on the same documents. length: tokens of context.
    Raises UserError as `TokenLosses.at` does.
    """
    kinds = list(dict.fromkeys(before.kinds))
    groups = [(kind, before.of_kind(kind), after.of_kind(kind)) for kind in kinds] + [(ALL, before, after)]
    found = []
    for kind, one, other in groups:
        losses, ranked = (one.at(length), other.at(length)), ranks(one.ids_at(length))
        for band in BANDS:
            inside = [_inside(array, *band) for array in ranked]
            if any(mask.any() for mask in inside):
                found.append(_band(kind, length, band, losses, inside, resamples, seed))
    return tuple(found)


def ranks(ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rank of every token, from 1 on. ids: one array of token ids for each document."""
    distinct, place, counts = np.unique(np.concatenate(ids), return_inverse=True, return_counts=True)
    rank = np.empty(len(distinct), np.int64)
    rank[np.lexsort((distinct, -counts))] = np.arange(1, len(distinct) + 1)
    return np.split(rank[place], np.cumsum([len(array) for array in ids])[:-1])


def _inside(ranked: np.ndarray, first: int, last: int | None) -> np.ndarray:
    return (ranked >= first) & (ranked <= (np.inf if last is None else last))


def _band(
    kind: str,
    length: int,
    band: tuple[int, int | None],
    losses: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    inside: Sequence[np.ndarray],
    resamples: int,
    seed: int,
) -> FrequencyBand:
    before, after = ([array[mask] for array, mask in zip(arrays, inside, strict=True)] for arrays in losses)
    interval = ratio_interval(after, before, resamples=resamples, seed=seed)
    return FrequencyBand(
        kind=kind,
        length=length,
        first=band[0],
        last=band[1],
        tokens=sum(len(array) for array in before),
        before=perplexity(before),
        after=perplexity(after),
        ratio=interval.value,
        low=interval.low,
        high=interval.high,
        unit=interval.unit,
    )
