"""What a recovery reads, step by step: packed rows, the position ids of their tokens, and the stages of a schedule.

Everything is laid out before training, from the recipe and its seed, so that a run that resumes after a kill reads the
same rows at the same positions.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.context.positions import document_positions, pose_positions
from retrofit.data.packing import CHARS_PER_TOKEN, Packed, training_rows
from retrofit.data.samples import Teacher
from retrofit.data.sources import kind_of
from retrofit.data.texts import read_texts, unseen_held_out
from retrofit.errors import UserError
from retrofit.recipe.schema import Recover

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.model.spec import AttentionSpec

_HELD_OUT = 104_729  # seeds of stages are neighbours; those of held-out positions stay away from them


@dataclass(frozen=True)
class Span:
    """`rows` rows in a row with the same length: positions their skips reach (pose), or tokens of a text (full)."""

    rows: int
    length: int


@dataclass(frozen=True)
class TrainRows:
    """Rows as they are trained on. positions_NT is None for 0 .. T-1; cuts: tokens of the texts a row is cut into.

    A row of T tokens whose cut is T / k is k texts of a batch that do not see each other. counted_NT: as `Packed` has.
    """

    ids_NT: Tensor
    positions_NT: Tensor | None
    cuts: tuple[int, ...]
    counted_NT: Tensor | None = None

    def longest(self) -> tuple[Tensor, Tensor | None]:
        """(ids, positions) of the rows with the longest cut, [texts, tokens of a text]."""
        cut = max(self.cuts)
        chosen_N = torch.tensor([one == cut for one in self.cuts])
        positions_NT = None if self.positions_NT is None else self.positions_NT[chosen_N].view(-1, cut)
        return self.ids_NT[chosen_N].view(-1, cut), positions_NT


def check_lengths(recipe: Recover, native: int, claimed: int) -> None:
    """The lengths of a recovery fit the model. native: the teacher's window; claimed: the student's, in tokens.

    Raises UserError: positions beyond the student's window, skips without room, a teacher that is asked beyond its own.
    """
    reach = max((stage.length for stage in recipe.stages), default=0)
    if reach > claimed:
        raise UserError(
            f"a stage reaches {reach} positions, the model has {claimed}",
            where="recover.stages",
            fix=f"at most {claimed}, or extend the window first (context.length)",
        )
    if recipe.positions == "pose" and claimed <= recipe.sequence_length:
        raise UserError(
            f"rows of {recipe.sequence_length} tokens leave nothing to skip in a window of {claimed}",
            where="recover.positions: pose",
            fix="shorten recover.sequence_length, or use positions: full",
        )
    if recipe.loss == "distill" and recipe.sequence_length > native:
        raise UserError(
            f"the original model reads {native} tokens; of rows of {recipe.sequence_length} it knows nothing to teach",
            where="recover.loss: distill",
            fix=f"use loss: lm, or positions: pose with sequence_length: {native} or less",
        )


def spans(recipe: Recover, window: int) -> tuple[Span, ...]:
    """The stages in order; one span without stages. window: the student's, which skips reach by default.

    A stage has whole batches, so that every step belongs to one stage.
    """
    rows = math.ceil(recipe.tokens / recipe.sequence_length)
    if not recipe.stages:
        return (Span(rows, window if recipe.positions == "pose" else recipe.sequence_length),)
    per_step = recipe.batch_size * recipe.sequence_length
    return tuple(Span(math.ceil(stage.tokens / per_step) * recipe.batch_size, stage.length) for stage in recipe.stages)


def recovery_rows(
    recipe: Recover,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    teacher: Teacher,
    progress: Progress | None = None,
) -> tuple[Packed, Packed | None]:
    """(training rows of all stages, held-out rows); nothing is held out of one single document.

    teacher: the original model, for the text source `self`.
    """
    length, text = recipe.sequence_length, recipe.text
    parts: list[Packed] = []
    for index, span in enumerate(_merged(recipe)):
        cut = length if recipe.positions == "pose" else span.length
        how: dict[str, Any] = {"teacher": teacher, "loss_on": recipe.loss_on, "progress": progress}
        part = training_rows(text, tokenizer, span.rows * length, cut, seed + index, **how)
        shape = span.rows, length
        counted = None if part.counted_NT is None else part.counted_NT.view(shape)
        parts.append(Packed(part.ids_NT.view(shape), part.documents_NT.view(shape), part.notes, counted))
    only, notes = unseen_held_out(
        text,
        train_chars=CHARS_PER_TOKEN * sum(part.ids_NT.numel() for part in parts),
        held_out_chars=CHARS_PER_TOKEN * (recipe.eval_tokens + length),
    )
    train = Packed(
        torch.cat([part.ids_NT for part in parts]),
        torch.cat([part.documents_NT for part in parts]),
        tuple(dict.fromkeys((*notes, *(note for part in parts for note in part.notes)))),
        _counted(parts),
    )
    held_out = {source: only.get(kind_of(source.source)) for source in text}
    if not any(
        next(read_texts(source, split="held_out", teacher=teacher, only=names), None)
        for source, names in held_out.items()
    ):
        return train, None
    how = {"teacher": teacher, "only": only, "loss_on": recipe.loss_on, "progress": progress}
    return train, training_rows(text, tokenizer, recipe.eval_tokens, length, seed, "held_out", **how)


def _counted(parts: Sequence[Packed]) -> Tensor | None:
    """What counts of all parts; those that do not say so count all."""
    if all(part.counted_NT is None for part in parts):
        return None
    every = (part.counted_NT if part.counted_NT is not None else torch.ones_like(part.ids_NT) > 0 for part in parts)
    return torch.cat(list(every))


def training_lines(packed: Packed, recipe: Recover, window: int, seed: int) -> TrainRows:
    """Rows of all stages with the positions of their tokens."""
    positions, cuts = [], []
    length, start = packed.ids_NT.shape[1], 0
    for index, span in enumerate(spans(recipe, window)):
        rows = min(span.rows, len(packed.ids_NT) - start)
        cut = length if recipe.positions == "pose" else span.length
        documents_NT = packed.documents_NT[start : start + rows]
        positions.append(_positions(documents_NT, cut, recipe, span.length, seed + index))
        cuts += [cut] * rows
        start += rows
    assert start == len(packed.ids_NT)
    given = [one for one in positions if one is not None]
    return TrainRows(packed.ids_NT, torch.cat(given) if given else None, tuple(cuts), packed.counted_NT)


def held_out_lines(packed: Packed, recipe: Recover, window: int, seed: int) -> TrainRows:
    """Held-out rows as the longest stage is trained, short ones included, so that the best is the best at both."""
    length = packed.ids_NT.shape[1]
    reach = max(span.length for span in spans(recipe, window))
    positions_NT = _positions(packed.documents_NT, length, recipe, reach, seed + _HELD_OUT)
    return TrainRows(packed.ids_NT, positions_NT, (length,) * len(packed.ids_NT), packed.counted_NT)


def _positions(documents_NT: Tensor, cut: int, recipe: Recover, reach: int, seed: int) -> Tensor | None:
    rows, length = documents_NT.shape
    if recipe.positions == "pose":
        return pose_positions(rows, length, reach, chunks=recipe.pose_chunks, short_share=recipe.short_share, seed=seed)
    if recipe.document_masking:
        return document_positions(documents_NT.reshape(-1, cut)).view(rows, length)
    return None


def _merged(recipe: Recover) -> tuple[Span, ...]:
    """Spans whose rows are packed alike: with pose all stages read rows of one length."""
    found = spans(recipe, recipe.sequence_length)
    return (Span(sum(span.rows for span in found), recipe.sequence_length),) if recipe.positions == "pose" else found


def about(recipe: Recover, window: int, spec: AttentionSpec) -> tuple[str, ...]:
    """What a person should know about the positions of this training; () for plain rows."""
    notes = []
    if recipe.positions == "pose":
        reach = ", then ".join(f"{span.length:,}" for span in spans(recipe, window))
        notes.append(
            f"positions skip ahead in {recipe.pose_chunks} chunks, rows of {recipe.sequence_length:,} tokens reach "
            f"{reach} positions; {recipe.short_share:.0%} of the rows keep ordinary ones"
        )
        if any(layer.window for layer in spec.layers):
            notes.append(
                "sliding-window layers count tokens, not positions: around a skip they see distances that they never "
                "meet in a text"
            )
    elif recipe.stages:
        reach = ", then ".join(f"{span.length:,}" for span in spans(recipe, window))
        notes.append(f"a schedule of lengths: rows of {reach} tokens, as many tokens a step throughout")
    if recipe.document_masking:
        notes.append("packed documents do not see each other")
    return tuple(notes)
