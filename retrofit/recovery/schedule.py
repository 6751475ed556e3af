"""What a recovery reads, step by step: packed rows, the position ids of their tokens, and the stages of a schedule.

Everything is laid out before training, from the recipe and its seed, so that a run that resumes after a kill reads the
same rows at the same positions.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.context.positions import document_positions, pose_positions
from retrofit.data.corpora import Split
from retrofit.data.packing import CHARS_PER_TOKEN, Packed, is_bare, training_rows
from retrofit.data.samples import Teacher
from retrofit.data.sources import kind_of
from retrofit.data.texts import unseen_held_out
from retrofit.errors import UserError
from retrofit.recipe.recovery import distils, stages_of
from retrofit.recipe.schema import Recover, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.model.spec import AttentionSpec

_HELD_OUT = 104_729  # seeds of stages are neighbours; those of held-out positions stay away from them


@dataclass(frozen=True)
class Span:
    """`rows` rows that follow each other and are read alike, whole steps of them.

    cut: tokens of the texts that a row is cut into, which do not see each other. reach: positions of a text, beyond
    `cut` where they skip (pose). learned: by the loss of a language model, not from the original.
    """

    rows: int
    cut: int
    reach: int
    learned: bool = False

    @property
    def pose(self) -> bool:
        """Whether positions skip ahead."""
        return self.reach > self.cut


@dataclass(frozen=True)
class TrainRows:
    """Rows as they are trained on. positions_NT is None for 0 .. T-1; cuts: tokens of the texts a row is cut into.

    A row of T tokens whose cut is T / k is k texts of a batch that do not see each other. counted_NT: as `Packed` has.
    learned: of each row, whether it is learned from the text and not from the original; () where none is. weights_NT:
    what the loss of the token after each one is multiplied with where a row is learned; None for 1.
    """

    ids_NT: Tensor
    positions_NT: Tensor | None
    cuts: tuple[int, ...]
    counted_NT: Tensor | None = None
    learned: tuple[bool, ...] = ()
    weights_NT: Tensor | None = None

    def skipping(self) -> tuple[Tensor, Tensor | None]:
        """(ids, positions) of the rows with the longest cut whose positions are not 0 .. cut-1, [texts, cut]; of those
        with the longest cut where all are."""
        rows = [row for row in range(len(self.cuts)) if self.positions_of([row]) is not None] or range(len(self.cuts))
        cut = max(self.cuts[row] for row in rows)
        chosen = [row for row in rows if self.cuts[row] == cut]
        return self.ids_NT[chosen].view(-1, cut), self.positions_of(chosen)

    def positions_of(self, rows: Sequence[int]) -> Tensor | None:
        """Positions [texts, cut] of rows with one cut; None where all of them are 0 .. cut-1."""
        if self.positions_NT is None:
            return None
        cut = self.cuts[rows[0]]
        positions_BT = self.positions_NT[list(rows)].view(-1, cut)
        return None if bool((positions_BT == torch.arange(cut)).all()) else positions_BT


def check_lengths(recipe: Recover, native: int, claimed: int) -> None:
    """The lengths of a recovery fit the models. native: the teacher's window; claimed: the student's, in tokens.

    Raises UserError: positions beyond the student's window, skips without room, a teacher that is asked beyond its own.
    """
    for number, stage in enumerate(stages_of(recipe), 1):
        at = f"recover.stages, stage {number}" if recipe.stages else "recover"
        rows, reach = stage.sequence_length or 0, stage.length or claimed
        if reach > claimed:
            raise UserError(
                f"a stage reaches {reach} positions, the model has {claimed}",
                where=at,
                fix=f"at most {claimed}, or extend the context first (context.length)",
            )
        if stage.positions == "pose" and reach <= rows:
            raise UserError(
                f"rows of {rows} tokens leave nothing to skip in a window of {claimed}",
                where=f"{at}.positions: pose",
                fix="shorten sequence_length, or use positions: full",
            )
        taught = [rows] if stage.loss == "distill" else []
        taught += [stage.short_length] if stage.short_length and recipe.loss == "distill" else []
        if taught and max(taught) > native:
            raise UserError(
                f"the original model reads {native} tokens; of rows of {max(taught)} it knows nothing to teach",
                where=f"{at}.loss: distill",
                fix=f"use loss: lm for them, or positions: pose with sequence_length: {native} or less",
            )


def spans(recipe: Recover, window: int, seed: int = 0) -> tuple[Span, ...]:
    """What is read, in order. window: the student's, which skips reach by default; seed: which steps are short.

    A stage has whole batches, so that every step belongs to one stage and all its rows are read alike.
    """
    found: list[Span] = []
    for index, stage in enumerate(stages_of(recipe)):
        cut = stage.sequence_length or 0
        long = Span(0, cut, stage.length or window, stage.loss == "lm")
        short = None
        if stage.short_length is not None:
            short = Span(0, stage.short_length, stage.short_length, recipe.loss == "lm")
        rows = math.ceil(stage.tokens / recipe.sequence_length)
        steps = math.ceil(rows / recipe.batch_size)
        if recipe.stages:
            rows = steps * recipe.batch_size
        chosen = _short_steps(steps, recipe.short_share, seed + index) if short else frozenset()
        for step in range(steps):
            span = short if short and step in chosen else long
            own = min(recipe.batch_size, rows - step * recipe.batch_size)
            if found and step and replace(found[-1], rows=0) == span:
                found[-1] = replace(span, rows=found[-1].rows + own)
            else:
                found.append(replace(span, rows=own))
    return tuple(found)


def measured_spans(recipe: Recover, window: int, seed: int, rows: int | None = None) -> tuple[Span, ...]:
    """What the held-out loss is measured on, in order: rows as the stage that reaches furthest reads them, the last of
    those, short ones included, so that the best state is the best at both. rows: by default for `eval_tokens` tokens.
    """
    furthest = max(reversed(stages_of(recipe)), key=lambda stage: stage.length or math.inf)
    width = furthest.sequence_length or 0
    tokens = width * (rows or math.ceil(recipe.eval_tokens / width))
    stage = furthest.model_copy(update={"tokens": tokens})
    one = recipe.model_copy(update={"stages": (stage,), "sequence_length": width, "batch_size": 1})
    return spans(one, window, seed + _HELD_OUT)


def _short_steps(steps: int, share: float, seed: int) -> frozenset[int]:
    """Which of the steps of a stage read short texts: all but one at most."""
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed)).tolist()
    return frozenset(order[: min(round(share * steps), steps - 1)])


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
    text, every = recipe.text, spans(recipe, recipe.sequence_length, seed)
    how: dict[str, Any] = {"teacher": teacher, "loss_on": recipe.loss_on, "progress": progress}
    train = _rows(every, recipe.sequence_length, text, tokenizer, seed, "train", **how)
    measured = measured_spans(recipe, recipe.sequence_length, seed)
    only, notes = unseen_held_out(
        text,
        train_chars=CHARS_PER_TOKEN * train.ids_NT.numel(),
        held_out_chars=CHARS_PER_TOKEN * (recipe.eval_tokens + recipe.sequence_length),
    )
    train = replace(train, notes=tuple(dict.fromkeys((*notes, *train.notes))))
    held_out = {source: only.get(kind_of(source.source)) for source in text}
    if all(is_bare(source, "held_out", teacher, names) for source, names in held_out.items()):
        return train, None
    width = max(span.cut for span in measured)
    return train, _rows(measured, width, text, tokenizer, seed, "held_out", only=only, **how)


def _rows(
    every: Sequence[Span],
    width: int,
    text: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    split: Split,
    **how: Any,
) -> Packed:
    """The rows of spans in their order, `width` tokens each; texts of one length are packed together."""
    total: dict[int, int] = {}
    for span in every:
        total[span.cut] = total.get(span.cut, 0) + span.rows
    packed = {
        cut: training_rows(text, tokenizer, rows * width, cut, seed + index, split, **how)
        for index, (cut, rows) in enumerate(total.items())
    }
    begins = dict.fromkeys(total, 0)
    parts: list[Packed] = []
    for span in every:
        one, begin = packed[span.cut], begins[span.cut]
        begins[span.cut] = stop = begin + span.rows * width // span.cut
        counted = None if one.counted_NT is None else one.counted_NT[begin:stop].view(-1, width)
        ids_NT, documents_NT = (tensor[begin:stop].view(-1, width) for tensor in (one.ids_NT, one.documents_NT))
        parts.append(Packed(ids_NT, documents_NT, (), counted))
    return Packed(
        torch.cat([part.ids_NT for part in parts]),
        torch.cat([part.documents_NT for part in parts]),
        tuple(dict.fromkeys(note for one in packed.values() for note in one.notes)),
        _counted(parts),
        tuple(dict.fromkeys(line for one in packed.values() for line in one.read)),
    )


def _counted(parts: Sequence[Packed]) -> Tensor | None:
    """What counts of all parts; those that do not say so count all."""
    if all(part.counted_NT is None for part in parts):
        return None
    every = (part.counted_NT if part.counted_NT is not None else torch.ones_like(part.ids_NT) > 0 for part in parts)
    return torch.cat(list(every))


def training_lines(packed: Packed, recipe: Recover, window: int, seed: int) -> TrainRows:
    """Rows of all stages with the positions of their tokens."""
    return _lines(packed, spans(recipe, window, seed), recipe, seed)


def held_out_lines(packed: Packed, recipe: Recover, window: int, seed: int) -> TrainRows:
    """Held-out rows with the positions of their tokens."""
    return _lines(packed, measured_spans(recipe, window, seed, len(packed.ids_NT)), recipe, seed + _HELD_OUT)


def _lines(packed: Packed, every: Sequence[Span], recipe: Recover, seed: int) -> TrainRows:
    positions: list[Tensor] = []
    cuts: list[int] = []
    learned: list[bool] = []
    skips = False
    for index, span in enumerate(every):
        begin = len(cuts)
        documents_BT = packed.documents_NT[begin : begin + span.rows].reshape(-1, span.cut)
        given_BT = _positions(documents_BT, span, recipe, seed + index)
        skips |= given_BT is not None
        plain_BT = torch.arange(span.cut).expand_as(documents_BT)
        positions.append((plain_BT if given_BT is None else given_BT).reshape(-1, packed.ids_NT.shape[1]))
        cuts += [span.cut] * len(positions[-1])
        learned += [span.learned] * len(positions[-1])
    assert len(cuts) == len(packed.ids_NT)
    positions_NT = torch.cat(positions) if skips else None
    return TrainRows(packed.ids_NT, positions_NT, tuple(cuts), packed.counted_NT, tuple(learned))


def _positions(documents_BT: Tensor, span: Span, recipe: Recover, seed: int) -> Tensor | None:
    if span.pose:
        texts, chunks, share = len(documents_BT), recipe.pose_chunks, recipe.short_share
        return pose_positions(texts, span.cut, span.reach, chunks=chunks, short_share=share, seed=seed)
    return document_positions(documents_BT) if recipe.document_masking else None


def about(recipe: Recover, window: int, spec: AttentionSpec) -> tuple[str, ...]:
    """What a person should know about the positions of this training; () for plain rows."""
    notes = []
    stages = stages_of(recipe)
    skipping = [stage for stage in stages if stage.positions == "pose"]
    if skipping:
        rows = ", then ".join(dict.fromkeys(f"{stage.sequence_length:,}" for stage in skipping))
        reach = ", then ".join(f"{stage.length or window:,}" for stage in skipping)
        notes.append(
            f"positions skip ahead in {recipe.pose_chunks} chunks, rows of {rows} tokens reach "
            f"{reach} positions; {recipe.short_share:.0%} of the rows keep ordinary ones"
        )
        if any(layer.window for layer in spec.layers):
            notes.append(
                "sliding-window layers count tokens, not positions: around a skip they see distances that they never "
                "meet in a text"
            )
    if len({(stage.sequence_length, stage.positions) for stage in stages}) > 1:
        rows = ", then ".join(f"{stage.sequence_length:,}" for stage in stages)
        notes.append(f"a schedule of lengths: rows of {rows} tokens, as many tokens a step throughout")
    short = {stage.short_length for stage in stages if stage.short_length}
    if short:
        texts = ", then ".join(f"{one:,}" for one in sorted(short))
        notes.append(f"{recipe.short_share:.0%} of the steps on whole rows read texts of {texts} tokens instead")
    if distils(recipe) and any(stage.loss == "lm" for stage in stages):
        rows = ", then ".join(dict.fromkeys(f"{one.sequence_length:,}" for one in stages if one.loss == "lm"))
        notes.append(
            f"rows of {rows} tokens are learned from the text, the others from the original; losses of both are nats "
            "a token, but of different kinds"
        )
    if recipe.document_masking:
        notes.append("packed documents do not see each other")
    return tuple(notes)
