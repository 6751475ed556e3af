"""How far an engine's log-probabilities are from transformers', and how far a changed model would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrofit.publishing.engines.run import Rows

TELLS = 20.0
"""A difference proves something where the control is at least so many times as large."""


@dataclass(frozen=True)
class Distance:
    """|difference of log-probabilities| in nats over the tokens that the engine gave; greedy: share of positions with
    the same most probable token."""

    largest: float
    mean: float
    greedy: float
    positions: int


def distance(reference: Sequence[Rows], found: Sequence[Rows]) -> Distance:
    """How far `found` is from `reference`, whose rows are the whole vocabulary; infinitely for what is not finite."""
    differences, same = [], []
    for expected, rows in zip(reference, found, strict=True):
        assert expected.tokens is None
        if rows.tokens is None:
            width = expected.logprobs.shape[1]  # engines pad a vocabulary with rows that no token has
            difference = rows.logprobs[:, :width] - expected.logprobs
        else:
            difference = rows.logprobs - np.take_along_axis(expected.logprobs, rows.tokens, 1)
        differences.append(np.abs(difference.astype(np.float64)).ravel())
        same += [a == b for a, b in zip(expected.greedy, rows.greedy, strict=True)]
    every = np.concatenate(differences)
    every = np.where(np.isfinite(every), every, np.inf)
    return Distance(float(every.max()), float(every.mean()), float(np.mean(same)), len(same))


def tells(largest: float, control: float | None) -> bool:
    """Whether a difference is so much smaller than the control's that it shows the same function."""
    return control is not None and control >= TELLS * max(largest, 1e-9)
