"""Two models side by side from their token losses, paired token by token, and from their answers to tasks, paired
question by question. numpy only; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retrofit.errors import UserError
from retrofit.evaluation.metrics.bits import ComparedBits, compare_bits
from retrofit.evaluation.metrics.bootstrap import ratio_interval
from retrofit.evaluation.metrics.frequency import FrequencyBand, by_frequency, shared_length
from retrofit.evaluation.metrics.perplexity import ALL, bits_per_byte, perplexity
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.tasks.answers import TaskAnswers, TaskChange, changes
from retrofit.model.cache_dtype import AUTO


@dataclass(frozen=True)
class Scored:
    """What one model was measured with. label: as people call it. losses: of tokens. answers: to tasks, by name."""

    label: str
    losses: TokenLosses
    answers: Mapping[str, TaskAnswers]


@dataclass(frozen=True)
class Compared:
    """Perplexities of two models on the same tokens. ratio [low, high]: ppl(b) / ppl(a) and its paired 95% interval."""

    kind: str
    length: int
    tokens: int
    ppl_a: float
    ppl_b: float
    ratio: float
    low: float
    high: float
    unit: str
    bpb_a: float | None = None
    bpb_b: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison. a, b: what was compared, as people call it.

    rows: perplexities, for one tokenizer. bands: the same by token frequency, at the longest of the lengths that both
    windows hold. bits: bits per byte on the same bytes, when those were asked for. tasks: of those that both were
    asked. read: the dtype and kernel that each was read with. seen: by kind of text, what each was made on text of it
    for, as `ModelEvaluation.seen` has it. notes: what else than the model may make a difference.
    """

    a: str
    b: str
    rows: tuple[Compared, ...]
    bands: tuple[FrequencyBand, ...] = ()
    bits: tuple[ComparedBits, ...] = ()
    tasks: tuple[TaskChange, ...] = ()
    read: tuple[str, str] = ("", "")
    seen: tuple[Mapping[str, tuple[str, ...]], Mapping[str, tuple[str, ...]]] = ({}, {})
    notes: tuple[str, ...] = ()


def compare(
    a: Scored,
    b: Scored,
    where: str,
    *,
    lengths: Sequence[int] | None = None,
    bits: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two models. where: the files, for messages.

    lengths: by default powers of two up to the shorter of the two, from 512 on, and that length itself; of positions
    that change with the length, those that both hold. bits: compare bits per byte on the same bytes and nothing else;
    the only comparison that two tokenizers allow.
    Raises UserError when tokenizers, texts or contexts differ, when a document is shorter than a length, or when a
    length is not held.
    """
    tasks, notes = _tasks(a.answers, b.answers, resamples, seed)
    rows: list[Compared] = []
    bands: tuple[FrequencyBand, ...] = ()
    compared_bits: tuple[ComparedBits, ...] = ()
    if bits:
        _require_same_texts(a.losses, b.losses, where)
        compared_bits = _bits(a.losses, b.losses, where, resamples, seed)
    else:
        _require_same(a.losses, b.losses, where)
        chosen = sorted(set(lengths)) if lengths else _held(a.losses, b.losses, where)
        for kind in (*dict.fromkeys(a.losses.kinds), ALL):
            kind_a, kind_b = (one.losses if kind == ALL else one.losses.of_kind(kind) for one in (a, b))
            rows += [_row(kind_a, kind_b, kind, length, resamples, seed) for length in chosen]
        shared = shared_length(chosen, (_window(a.losses), _window(b.losses)))
        if shared is None:
            notes = (*notes, "not compared by token frequency: no length lies within the windows of both models")
        else:
            bands = by_frequency(a.losses, b.losses, shared, resamples=resamples, seed=seed)
    both = [(what, str(a.losses.meta.get(what)), str(b.losses.meta.get(what))) for what in ("dtype", "kernel")]
    stored = [str(one.losses.meta.get("kv_cache_dtype", AUTO)) for one in (a, b)]
    if set(stored) != {AUTO}:
        both.append(("a KV cache of", stored[0], stored[1]))
    rounding = tuple(
        f"a was read with {what} {of_a}, b with {of_b}: part of the difference may be rounding"
        for what, of_a, of_b in both
        if of_a != of_b
    )
    read_a, read_b = (", ".join(f"{one[0]} {one[i]}" for one in both) for i in (1, 2))
    notes = (*rounding, *notes)
    seen = (a.losses.seen, b.losses.seen)
    return Comparison(a.label, b.label, tuple(rows), bands, compared_bits, tasks, (read_a, read_b), seen, notes)


def _window(losses: TokenLosses) -> int | None:
    """Positions of the model; None where they are not recorded."""
    positions = losses.meta.get("positions")
    return positions if isinstance(positions, int) else None


def _row(a: TokenLosses, b: TokenLosses, kind: str, length: int, resamples: int, seed: int) -> Compared:
    arrays_a, arrays_b = a.at(length), b.at(length)
    interval = ratio_interval(arrays_b, arrays_a, resamples=resamples, seed=seed)
    return Compared(
        kind=kind,
        length=length,
        tokens=sum(len(array) for array in arrays_a),
        ppl_a=perplexity(arrays_a),
        ppl_b=perplexity(arrays_b),
        ratio=interval.value,
        low=interval.low,
        high=interval.high,
        unit=interval.unit,
        bpb_a=bits_per_byte(a, length),
        bpb_b=bits_per_byte(b, length),
    )


def _tasks(
    a: Mapping[str, TaskAnswers], b: Mapping[str, TaskAnswers], resamples: int, seed: int
) -> tuple[tuple[TaskChange, ...], tuple[str, ...]]:
    """Both models on the questions that both were asked, and notes on tasks that have none."""
    rows, notes = [], []
    for name in (name for name in a if name in b):
        found = changes(a[name], b[name], resamples=resamples, seed=seed)
        rows += found
        if not set(a[name].asked) & set(b[name].asked):
            notes.append(
                f"task {name}: a and b were asked no question alike (other data, or another number of examples)"
            )
    return tuple(rows), tuple(notes)


def _held(a: TokenLosses, b: TokenLosses, where: str) -> list[int]:
    """The lengths to compare at when none is named: usual ones, or those that both were scored at."""
    usual = default_lengths(min(a.longest, b.longest))
    held = [n for n in sorted({*usual, *a.by_length, *b.by_length}) if a.holds(n) and b.holds(n)]
    if not held:
        raise UserError(
            "the positions change with the length, and no length was scored in both",
            where=where,
            fix="evaluate both models with the same --lengths",
        )
    return held


def default_lengths(longest: int) -> list[int]:
    """Powers of two from 512 below `longest`, and `longest`."""
    powers = [2**power for power in range(9, 31) if 2**power < longest]
    return [*powers, longest]


def _bits(a: TokenLosses, b: TokenLosses, where: str, resamples: int, seed: int) -> tuple[ComparedBits, ...]:
    pairs = [(kind, a.of_kind(kind), b.of_kind(kind)) for kind in dict.fromkeys(a.kinds)] + [(ALL, a, b)]
    return tuple(compare_bits(x, y, kind, where=where, resamples=resamples, seed=seed) for kind, x, y in pairs)


def _same_marks(a: TokenLosses, b: TokenLosses) -> bool:
    """Whether the same tokens of dialogues count, as far as both were read."""
    none: tuple[np.ndarray | None, ...] = (None,) * len(a.losses)
    for x, y in zip(a.scored or none, b.scored or none, strict=True):
        if (x is None) != (y is None):
            return False
        if x is not None and y is not None:
            cut = min(len(x), len(y))
            if not np.array_equal(x[:cut], y[:cut]):
                return False
    return True


def _require_same_texts(a: TokenLosses, b: TokenLosses, where: str) -> None:
    """The same texts in the same order, however many tokens of each were read."""
    texts = [losses.meta.get("texts_sha256") for losses in (a, b)]
    known = isinstance(texts[0], list) and None not in texts[0] and not (a.scored or b.scored)
    if (a.documents, a.kinds) != (b.documents, b.kinds) or texts[0] != texts[1] or not known:
        raise UserError(
            "these losses are not known to be of the same texts",
            where=where,
            fix="evaluate both models with the same --text or --suite and --documents",
        )


def _require_same(a: TokenLosses, b: TokenLosses, where: str) -> None:
    """Losses are comparable when the same tokenizer read the same texts; a shorter cut of them is the same text."""
    if a.meta.get("tokenizer_sha256") != b.meta.get("tokenizer_sha256"):
        raise UserError(
            "these losses were made with different tokenizers, and a loss per token cannot be compared between them",
            where=where,
            fix="compare bits per byte: add --bits-per-byte",
        )
    if a.meta.get("windows") != b.meta.get("windows"):
        raise UserError(
            "these losses were scored with different amounts of context",
            where=where,
            fix="evaluate both models with the same options",
        )
    same_names = (a.documents, a.kinds) == (b.documents, b.kinds)
    cut = min((len(x) for x in (*a.losses, *b.losses)), default=0)
    same_tokens = same_names and all((x[:cut] == y[:cut]).all() for x, y in zip(a.token_ids, b.token_ids, strict=True))
    same_tokens = same_tokens and _same_marks(a, b)
    texts = [losses.meta.get("texts_sha256") for losses in (a, b)]
    if a.meta.get("documents_sha256") != b.meta.get("documents_sha256") and not (same_tokens and texts[0] == texts[1]):
        raise UserError(
            "these losses are of different texts, or of another revision of the same",
            where=where,
            fix="evaluate both models with the same --text or --suite and --lengths",
        )
