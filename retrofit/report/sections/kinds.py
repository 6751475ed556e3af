"""Kinds of text: what each was read for by the steps, and what was lost on each, by how frequent a token is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrofit import format as fmt
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.report.parts import Figure, Table

if TYPE_CHECKING:
    from retrofit.evaluation.metrics.frequency import FrequencyBand
    from retrofit.report.data import RunData

FEW_DOCUMENTS = 5


def kind_name(run: RunData, kind: str) -> str:
    """A kind of text as a reader sees it, with what it was read for."""
    return fmt.kind(kind, run.seen, "all texts together" if kind == ALL else "")


def unseen_name(run: RunData, kind: str) -> str:
    """A kind of text in a sentence: only an unseen one is marked."""
    return fmt.kind(kind, run.seen) if run.seen.get(kind) == () else kind


def about_marks(run: RunData) -> str:
    """What the marks of kinds of text mean; empty where no step read any text."""
    if not run.seen:
        return ""
    return (
        "In brackets: what other documents of this kind of text were read for; of an unseen kind none was read. The "
        "documents measured here were read by no step."
    )


def ratio(run: RunData, kind: str, length: int) -> float | None:
    """Perplexity of the final model over the original's, same kind and length."""
    if run.original is None or run.final is None:
        return None
    before, after = run.original.row(kind, length), run.final.row(kind, length)
    return after.ppl / before.ppl if before and after else None


def cautions(run: RunData) -> list[str]:
    """How far the texts that were measured speak for others."""
    sentences = []
    kinds = [kind for kind in run.kinds if kind != ALL]
    if run.lengths and len(kinds) == 1:
        sentences.append(f"Measured on one kind of text only ({kinds[0]}); other kinds can come out differently.")
    if alike := fmt.none_unseen(run.seen):
        sentences.append(alike)
    few = sorted({row.documents for model in run.models for row in model.rows if row.kind != ALL})
    if few and few[0] < FEW_DOCUMENTS:
        sentences.append(
            f"As few as {few[0]} document{'s' if few[0] > 1 else ''} per kind of text: the intervals show the spread "
            "within these documents, not over all text of the kind."
        )
    if run.head_length and len(kinds) > 1:
        found = {kind: value for kind in kinds if (value := ratio(run, kind, run.head_length)) is not None}
        if found and max(found.values()) > 1.25 * min(found.values()):
            worst = max(found, key=lambda kind: found[kind])
            sentences.append(
                f"Quality differs by kind of text: {kind_name(run, worst)} lost most ({fmt.times(found[worst])})."
            )
    return sentences


def by_frequency(run: RunData) -> Iterator[Figure]:
    """What the final model lost on each kind of text and on each band of token ranks, paired token by token."""
    bands = run.final.by_frequency if run.final else ()
    if not bands or run.final is None:
        return
    rows = [[band for band in bands if band.kind == kind] for kind in run.kinds]
    columns = list(dict.fromkeys((band.first, band.last) for row in rows for band in row))
    length, unit = bands[0].length, next(band.unit for band in bands if band.kind == run.kinds[-1])
    yield Figure(
        "quality",
        "What it lost, by kind of text and by how frequent a token is",
        f"Perplexity of {run.final.label} over the original's on the same tokens at {fmt.count(length)} tokens, with "
        f"its 95% interval (paired; bootstrap over each {unit}). Rank 1 is the most frequent token of a kind of text. "
        "Frequent tokens are mostly spaces, signs and small words; what a model knows stands in the rare ones. "
        f"{_shares(rows[-1])}",
        Table(
            (
                "text",
                *(["read in"] if run.seen else []),
                "tokens",
                *(f"rank {fmt.ranks(*c)}" if c != columns[0] else "all tokens" for c in columns),
            ),
            tuple(_row(run, row, columns) for row in rows if row),
        ),
    )


def _row(run: RunData, bands: list[FrequencyBand], columns: list[tuple[int, int | None]]) -> tuple[str, ...]:
    found = {(band.first, band.last): fmt.interval(band.ratio, band.low, band.high) for band in bands}
    kind, tokens = bands[0].kind, max(band.tokens for band in bands)
    mark = [fmt.read_in(run.seen, kind)] if run.seen else []
    name = "all texts together" if kind == ALL else kind
    return (name, *mark, fmt.count(tokens), *(found.get(column, fmt.NONE) for column in columns))


def _shares(bands: list[FrequencyBand]) -> str:
    """How many of all tokens stand in each band."""
    every = next(band.tokens for band in bands if band.every)
    parts = [f"{fmt.ranks(band.first, band.last)}: {band.tokens / every:.0%}" for band in bands if not band.every]
    whose = "all tokens" if bands[0].kind == ALL else "the tokens"
    return f"Shares of {whose}, by rank: {', '.join(parts)}."
