"""Rows that measure a window: text, and a passage that comes again when its first copy lies outside.

A row is a passage, other text, and the passage once more: 2 windows in all, of which each passage is an eighth. Whoever
looks back only a window finds nothing of the first copy from the second one. So one pass over the row gives three
losses: of text whose window still holds everything (near), of text that a window hides something from (far), and of the
second copy (answers), apart from its first tokens, from which the passage has to be recognised.

Legend: N rows, R tokens of a row, P positions whose next token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrofit.data.calibration import CalibrationText
from retrofit.errors import UserError
from retrofit.windows import row_length

PASSAGE = 8
"""A passage is a row's length divided by this."""
RECOGNISED = 8
"""After a passage's length divided by this, its second copy counts."""
NEAR_EVERY = 4


@dataclass(frozen=True)
class Repeats:
    """ids [N, R] and the kind of text of each row. start: where the passage begins (after BOS); passage: its tokens;
    window: what the rows are made for."""

    input_ids_NR: Tensor
    kinds: tuple[str, ...]
    start: int
    passage: int
    window: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.input_ids_NR.shape[1]

    @property
    def parts(self) -> dict[str, Tensor]:
        """Positions whose next token counts, by what its loss says. Of the near ones every few: there are plenty."""
        copy = self.length - self.passage
        return {
            "near": torch.arange(0, self.window, NEAR_EVERY),
            "far": torch.arange(self.window, copy - 1),
            "answers": torch.arange(copy - 1 + max(1, self.passage // RECOGNISED), self.length - 1),
        }

    @property
    def positions(self) -> Tensor:
        """All of them, [P]."""
        return torch.cat(list(self.parts.values()))

    def means(self, losses_NP: Tensor) -> dict[str, float]:
        """Mean loss of every part. losses: at `positions`."""
        sizes = {name: len(part) for name, part in self.parts.items()}
        split = losses_NP.double().split(list(sizes.values()), 1)
        return {name: float(own.mean()) for name, own in zip(sizes, split, strict=True)}


def repeats(text: CalibrationText, window: int, rows: int, *, bos: bool) -> Repeats:
    """Rows made of the beginnings of a text's sequences, its kinds by turns. bos: they begin with a BOS token.

    Raises UserError for sequences that are shorter than a row.
    """
    length, start = row_length(window), int(bos)
    passage = length // PASSAGE
    if text.input_ids_NT.shape[1] < length:
        raise UserError(
            f"sequences of {text.input_ids_NT.shape[1]:,} tokens are too short to look beyond a window of {window:,}",
            where="window.calibration.sequence_length",
            fix=f"give at least {length:,}",
        )
    chosen = _by_turns(text.kinds, rows)
    body_NT = text.input_ids_NT[chosen][:, : length - passage]
    ids_NR = torch.cat([body_NT, body_NT[:, start : start + passage]], 1)
    return Repeats(ids_NR, tuple(text.kinds[row] for row in chosen), start, passage, window)


def split(text: CalibrationText, rows: int) -> tuple[CalibrationText, CalibrationText]:
    """(to fit on, to measure on): `rows` sequences, its kinds by turns, are left out of the first."""
    held_out = set(_by_turns(text.kinds, rows))
    return tuple(  # type: ignore[return-value]
        replace(text, input_ids_NT=text.input_ids_NT[own], kinds=tuple(text.kinds[row] for row in own))
        for own in ([i for i in range(len(text.kinds)) if (i in held_out) == left_out] for left_out in (False, True))
    )


def _by_turns(kinds: Sequence[str], rows: int) -> list[int]:
    """The first `rows` sequences, one of each kind after the other."""
    place: dict[str, int] = {}
    order = []
    for index, kind in enumerate(kinds):
        place[kind] = place.get(kind, 0) + 1
        order.append((place[kind], index))
    return [index for _, index in sorted(order)][:rows]
