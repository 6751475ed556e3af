"""The list of a budget as arithmetic: every combination of KV heads, windows and cache type, its bytes and its loss.

What a combination loses is predicted as the sum of what its parts lose alone, in nats per token, of text and of
answers (passages that come again from out of sight). That is an approximation: errors of two kinds of surgery add up on
the way through the layers, so that the best rows are measured before one is recommended. Torch-free.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from retrofit.model.cache_dtype import AUTO, cache_bytes
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.kv_budget import Budget

ORIGINAL, MEASURED, PREDICTED = "original", "measured", "predicted"
PILOTS = 3
"""Rows that meet the budget and are measured before one is recommended."""


@dataclass(frozen=True)
class Loss:
    """What the loss rises by, in nats per token: of text, and of answers out of sight."""

    text: float
    answers: float

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.text + other.text, self.answers + other.answers)

    def __sub__(self, other: Loss) -> Loss:
        return Loss(self.text - other.text, self.answers - other.answers)

    def weighed(self, answers: float) -> float:
        """One number to compare by: text and `answers` times the answers; less than nothing is nothing."""
        return max(0.0, self.text) + answers * max(0.0, self.answers)


NOTHING = Loss(0.0, 0.0)


@dataclass(frozen=True)
class Heads:
    """A number of KV heads and what it loses alone. how: "original", "measured" or "predicted"."""

    kv_heads: int
    loss: Loss
    how: str


@dataclass(frozen=True)
class Windows:
    """Windows of `size` tokens (None: none) in all layers but `full_layers`, and what they lose alone."""

    size: int | None
    full_layers: tuple[int, ...]
    loss: Loss
    how: str


@dataclass(frozen=True)
class Stored:
    """A type that an engine stores keys and values as, and what it loses alone."""

    cache_dtype: str
    loss: Loss
    how: str


@dataclass(frozen=True)
class BudgetRow:
    """One combination. nbytes: of the KV cache of one sequence at the budget's length. predicted: the sum of its parts.
    measured: of all of it together, None where it was not. commands: what makes it, and how it is served."""

    heads: Heads
    windows: Windows
    stored: Stored
    nbytes: int
    predicted: Loss
    measured: Loss | None = None
    commands: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Heads | Windows | Stored, ...]:
        """What of it is not the original's."""
        return tuple(part for part in (self.heads, self.windows, self.stored) if part.how != ORIGINAL)

    @property
    def surgery(self) -> bool:
        """Whether the checkpoint changes."""
        return self.heads.how != ORIGINAL or self.windows.how != ORIGINAL

    @property
    def how(self) -> str:
        """What its prediction comes from."""
        if not self.parts:
            return ORIGINAL
        if len(self.parts) == 1:
            return self.parts[0].how
        return "sum of " + " + ".join(part.how for part in self.parts)

    @property
    def loss(self) -> Loss:
        """What was measured, else what is predicted."""
        return self.measured or self.predicted


@dataclass(frozen=True)
class BudgetList:
    """The rows that no other one beats in bytes, text and answers at once, the model as it is first, from the most
    bytes to the fewest; and those that were measured.

    answer_weight: how much a nat of answers counts beside one of text. recommended: None
    where the best rows were not measured. tokens, kinds: of the text that losses are measured on.
    """

    model: str
    budget: Budget
    rows: tuple[BudgetRow, ...]
    recommended: BudgetRow | None
    answer_weight: float
    tokens: int
    kinds: tuple[str, ...]
    notes: tuple[str, ...] = ()


def combinations(
    spec: AttentionSpec,
    heads: Sequence[Heads],
    windows: Sequence[Windows],
    stored: Sequence[Stored],
    able: Collection[int],
    tokens: int,
    value_bytes: int,
) -> list[BudgetRow]:
    """All of them, each with its bytes at `tokens` tokens. able: layers that get a window unless they are full
    ones. value_bytes: of a value as the model computes it."""
    rows = []
    for one, own, kind in itertools.product(heads, windows, stored):
        changed = spec.with_kv_heads(one.kv_heads)
        if own.size is not None:
            changed = changed.with_windows(own.size, set(able) - set(own.full_layers))
        nbytes = cache_bytes(changed, tokens, kind.cache_dtype, value_bytes)
        row = BudgetRow(one, own, kind, nbytes, one.loss + own.loss + kind.loss)
        exact = not row.surgery and row.stored.how in (ORIGINAL, MEASURED)
        rows.append(replace(row, measured=row.predicted) if exact else row)
    return rows


def pareto(rows: Iterable[BudgetRow]) -> list[BudgetRow]:
    """The rows that no other one beats in bytes, text and answers; of equals the first. The most bytes first."""
    kept: list[BudgetRow] = []
    for row in sorted(rows, key=lambda row: (row.nbytes, row.loss.text, row.loss.answers)):
        if not any(one.loss.text <= row.loss.text and one.loss.answers <= row.loss.answers for one in kept):
            kept.append(row)
    return kept[::-1]


def best(rows: Iterable[BudgetRow], budget: Budget, answer_weight: float) -> list[BudgetRow]:
    """The rows that meet the budget, the one that loses least first; of equals the one with fewer changes."""
    meeting = [row for row in rows if row.nbytes <= budget.nbytes]
    return sorted(meeting, key=lambda row: (row.loss.weighed(answer_weight), len(row.parts), row.nbytes))


def original_row(rows: Iterable[BudgetRow]) -> BudgetRow:
    """The model as it is, served as it is."""
    return next(row for row in rows if not row.surgery and row.stored.cache_dtype == AUTO)
