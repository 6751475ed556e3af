"""The micro-batches of a training: the rows of every step, dealt out to the processes that train together.

A step reads the same rows whatever the number of processes. They take turns: row j of a step goes to process j modulo
their number. One that gets no row computes with another's, of which nothing counts, as all have to take part when
gradients or weights are exchanged.

Legend: N rows, B texts of a micro-batch, T tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retrofit.recovery.objectives import IGNORED
from retrofit.recovery.schedule import TrainRows

LEARNED, WEIGHTS = "learned", "weights"
UNKNOWN = 0  # a label that counts, and that no loss looks at


class MicroBatches(Dataset):
    """What one process reads, `per_step` items for each step.

    An item has `input_ids` [B, T], `position_ids` [B, T] where the rows have them, `next_ids` [B, T] (the token that
    follows, or IGNORED where that does not count; left out where every token counts), `weights` [B, T] of those where
    the rows have them, `tokens` (how many count in the whole step on all processes together, or the sum of their
    weights), `row` (the number of its first row) and `learned` (whether it is learned from the text, whatever teacher
    there is).

    batch_size: rows of a step on all processes. every_token: also the last of a text counts where a teacher has a
    distribution for it; a language model's loss does not know what follows it. rank: of `ranks` that read different
    rows. most: rows that a process computes at one time, by default all that it has of a step.
    """

    def __init__(
        self,
        lines: TrainRows,
        batch_size: int,
        *,
        every_token: bool,
        rank: int = 0,
        ranks: int = 1,
        most: int | None = None,
    ) -> None:
        self.lines, self.batch_size, self.every_token = lines, batch_size, every_token
        self.rank, self.ranks = rank, ranks
        rows = math.ceil(batch_size / ranks)
        self.per_step = math.ceil(rows / (most or rows))
        self.rows = math.ceil(rows / self.per_step)

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return math.ceil(len(self.lines.ids_NT) / self.batch_size)

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, part = divmod(index, self.per_step)
        rows = range(step * self.batch_size, min((step + 1) * self.batch_size, len(self.lines.ids_NT)))
        mine = rows[self.rank :: self.ranks][part * self.rows : (part + 1) * self.rows]
        item = self._texts(mine or rows[:1], counts=bool(mine))
        return {
            **item,
            "tokens": sum(map(self._counting, rows)),
            "row": (mine or rows)[0],
            LEARNED: self._learned(rows[0]),
        }

    def _learned(self, row: int) -> bool:
        return bool(self.lines.learned) and self.lines.learned[row]

    def _every(self, row: int) -> bool:
        """Whether the last token of a text counts."""
        return self.every_token and not self._learned(row)

    def _counting(self, row: int) -> float:
        """Tokens of a row that the loss counts, or the sum of their weights."""
        length, cut = self.lines.ids_NT.shape[1], self.lines.cuts[row]
        if self.lines.weights_NT is not None and self._learned(row):
            weights_NT, counted_NT = self.lines.weights_NT, self.lines.counted_NT
            weights_T = weights_NT[row] if counted_NT is None else weights_NT[row] * counted_NT[row]
            return float(weights_T.view(-1, cut)[:, :-1].sum(dtype=torch.float64))
        if self.lines.counted_NT is None:
            return length if self._every(row) else length - length // cut
        counted_BT = self.lines.counted_NT[row].view(-1, cut)
        return int((counted_BT if self._every(row) else counted_BT[:, :-1]).sum())

    def _texts(self, rows: Sequence[int], *, counts: bool) -> dict[str, Tensor]:
        cut = self.lines.cuts[rows[0]]
        index = list(rows)
        ids_BT = self.lines.ids_NT[index].view(-1, cut)
        item = {"input_ids": ids_BT}
        positions_BT = self.lines.positions_of(rows)
        if positions_BT is not None:
            item["position_ids"] = positions_BT
        if self.lines.weights_NT is not None and self._learned(rows[0]):
            item[WEIGHTS] = self.lines.weights_NT[index].view(-1, cut)
        counted_NT, every = self.lines.counted_NT, self._every(rows[0])
        if not counts:
            item["next_ids"] = torch.full_like(ids_BT, IGNORED)
        elif not every or counted_NT is not None:
            # What follows the last is not known; where it counts, the teacher's distribution stands for it.
            last_B1 = torch.full_like(ids_BT[:, :1], UNKNOWN if every else IGNORED)
            next_BT = torch.cat([ids_BT[:, 1:], last_B1], dim=1)
            if counted_NT is not None:
                next_BT = next_BT.masked_fill(~counted_NT[index].view(-1, cut), IGNORED)
            item["next_ids"] = next_BT
        return item
