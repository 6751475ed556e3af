"""On-policy rows: text that the student writes while it trains, and that the teacher judges token by token.

A student that reads only what others wrote never sees where its own words lead. Agarwal et al. 2023 (GKD,
arXiv:2306.13649, algorithm 1) let it write a share of what it is trained on; nothing is differentiated through the
writing. Rows of neighbouring steps are written together, as writing many costs little more than writing one, by the
student as it is when the first of them is due.

Which rows, their prompts and the numbers that decide about their tokens follow from the seed and the row's number. What
was written is kept in the work folder, so that a training that resumes reads the same.

Legend: N rows, B texts of a micro-batch, T tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrofit.data.sampling import random_numbers, sample_batch
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.layout import Layout
from retrofit.recovery.objectives import logits_of
from retrofit.recovery.schedule import TrainRows
from retrofit.recovery.sharding import split_again
from retrofit.recovery.student_teacher import StudentTeacher, autocast, body, head_of
from retrofit.system.world import World

if TYPE_CHECKING:
    from peft import PeftModel

TOGETHER = 32  # rows that are written at one time, unless a single step has more
REFRESH = 8  # times that the student writes in a training, at least: what it reads is no older than that
PROMPT = (
    8  # of every second row one token in so many is given; of the others the first, which is BOS where there is one
)


def own_rows(lines: TrainRows, share: float) -> tuple[int, ...]:
    """Numbers of the rows that the student writes: of those that the teacher judges, the last of every 1 / share."""
    judged = [row for row in range(len(lines.cuts)) if not (lines.learned and lines.learned[row])]
    due = [math.floor(number * share + 1e-9) for number in range(len(judged) + 1)]
    return tuple(row for number, row in enumerate(judged) if due[number + 1] > due[number])


def marked(lines: TrainRows, own: Sequence[int], *, masked: bool) -> TrainRows:
    """The rows, of which those in `own` are one text each that counts as a whole. masked: documents are kept apart."""
    positions_NT, counted_NT = lines.positions_NT, lines.counted_NT
    index = list(own)
    if positions_NT is not None and masked:
        positions_NT = positions_NT.clone()
        for row in own:
            positions_NT[row] = torch.arange(positions_NT.shape[1]) % lines.cuts[row]
    if counted_NT is not None:
        counted_NT = counted_NT.clone()
        counted_NT[index] = True
    return replace(lines, positions_NT=positions_NT, counted_NT=counted_NT)


@dataclass(frozen=True)
class Block:
    """Rows that are written together, for the steps from `start` on."""

    start: int
    rows: tuple[int, ...]


def blocks(own: Sequence[int], cuts: Sequence[int], steps: int, batch_size: int) -> tuple[Block, ...]:
    """The rows in the order of steps, in blocks of at most TOGETHER, of texts of one length, and of at most a
    REFRESH-th of the steps. The rows of a step stay together. cuts: of all rows."""
    found: list[Block] = []
    for step, group in groupby(own, lambda row: row // batch_size):
        rows = tuple(group)
        last = found[-1] if found else None
        if (
            last is not None
            and len(last.rows) + len(rows) <= TOGETHER
            and step - last.start < steps // REFRESH
            and cuts[last.rows[0]] == cuts[rows[0]]
        ):
            found[-1] = Block(last.start, last.rows + rows)
        else:
            found.append(Block(step, rows))
    return tuple(found)


class Writer:
    """Puts what the student writes in the place of the rows that are its own.

    All processes of `world` call it for every step, as weights may be split over them; those that read different rows
    share the writing. fingerprint: of the training, which kept rows belong to.
    """

    def __init__(
        self,
        pair: StudentTeacher,
        model: PeftModel,
        batches: MicroBatches,
        own: Sequence[int],
        *,
        compute: torch.dtype,
        seed: int,
        work_dir: Path,
        fingerprint: str,
        world: World,
        layout: Layout,
    ) -> None:
        self.pair, self.model, self.batches, self.compute, self.seed = pair, model, batches, compute, seed
        self.work_dir, self.fingerprint, self.world, self.layout = work_dir, fingerprint, world, layout
        self.own = {row: number for number, row in enumerate(own)}
        self.coming = list(blocks(own, batches.lines.cuts, batches.steps, batches.batch_size))
        self.written: dict[int, Tensor] = {}

    def __call__(self, step: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """The micro-batch with the student's own rows in it."""
        while self.coming and self.coming[0].start <= step:
            block = self.coming.pop(0)
            # Of a training that resumes, blocks of steps that are over are of no use any more.
            if block.rows[-1] // self.batches.batch_size >= step:
                self.written = self._block(block)
        ids_BT = inputs["input_ids"]
        cut = ids_BT.shape[1]
        texts = self.batches.lines.ids_NT.shape[1] // cut  # of a row
        ids_NT = ids_BT.view(-1, texts * cut).clone()
        for place in range(len(ids_NT)):
            own_T = self.written.get(inputs["row"] + place * self.batches.ranks)
            if own_T is not None:
                ids_NT[place] = own_T.to(ids_NT.device)
        return {**inputs, "input_ids": ids_NT.view(-1, cut)}

    def _block(self, block: Block) -> dict[int, Tensor]:
        path = self.work_dir / f"written-{block.start}.safetensors"
        kept_NT = self.world.share(_kept(path, self.fingerprint) if self.world.main else None)
        if kept_NT is None:
            ranks = self.layout.data_ranks
            mine = block.rows[self.layout.data_rank :: ranks]
            # Where weights are split all processes write as many, be it a row that is another's.
            equal = (mine + block.rows)[: math.ceil(len(block.rows) / ranks)]
            parts = self.world.gather((mine, self._write(equal)[: len(mine)]))
            found = {row: own_T for rows, own_NT in reversed(parts) for row, own_T in zip(rows, own_NT, strict=True)}
            kept_NT = torch.stack([found[row] for row in block.rows])
            if self.world.main:
                partial = path.with_suffix(".partial")
                save_file({"ids": kept_NT}, partial, {"fingerprint": self.fingerprint})
                partial.replace(path)
        return dict(zip(block.rows, kept_NT, strict=True))

    @torch.no_grad()
    def _write(self, rows: Sequence[int]) -> Tensor:
        """What the student writes now in these rows, [N, tokens of a row]; all are cut into texts of one length."""
        lines = self.batches.lines
        cut, starts, numbers = lines.cuts[rows[0]], [], []
        for row in rows:
            given = 1 if self.own[row] % 2 else max(1, cut // PROMPT)
            for place, text_T in enumerate(lines.ids_NT[row].view(-1, cut)):
                starts.append(text_T[:given].tolist())
                numbers.append(random_numbers(f"{self.seed} row {row} text {place}", cut - 1))
        training, device = self.model.training, self.pair.student.device
        self.model.eval()
        with _speaking(self.pair), autocast(device, self.compute, cache=False):
            rest_BT = sample_batch(cast(Any, self.model), self.pair.spec, starts, torch.stack(numbers))
        self.model.train(training)
        split_again(self.model)
        first_B1 = torch.tensor([[start[0]] for start in starts])
        return torch.cat([first_B1, rest_BT], 1).view(len(rows), -1)


@contextmanager
def _speaking(pair: StudentTeacher) -> Iterator[None]:
    """In the block the student's forward gives the next token's logits; otherwise hidden states (`train`)."""
    student, training = pair.student, pair.student.forward

    def forward(**inputs: Any) -> SimpleNamespace:
        inputs.pop("logits_to_keep")
        hidden_BTC: Tensor = body(student)(**inputs).last_hidden_state
        return SimpleNamespace(logits=logits_of(hidden_BTC[:, -1], head_of(student))[:, None])

    student.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        student.forward = training  # type: ignore[method-assign]


def _kept(path: Path, fingerprint: str) -> Tensor | None:
    """The rows that an earlier session of this very training wrote; those of another are removed."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        if (file.metadata() or {}).get("fingerprint") == fingerprint:
            ids_NT: Tensor = file.get_tensor("ids")
            return ids_NT
    path.unlink()
    return None
