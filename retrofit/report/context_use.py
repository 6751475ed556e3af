"""Whether the long context is used: the certificate of the effective length, and everything that speaks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from retrofit.evaluate.effective import certificate
from retrofit.report import charts, words
from retrofit.report.data import ModelResult, RunData
from retrofit.report.parts import Figure, Number, Table

if TYPE_CHECKING:
    from retrofit.evaluate.effective import LengthTests
    from retrofit.evaluate.needle import NeedleResult


def figures(run: RunData) -> Iterator[Figure]:
    """The section `context`: of the original and of the final model, what was asked for."""
    models = [model for model in (run.original, run.final) if model is not None and model.long_context]
    yield from _certificates(models)
    yield from _gains(models)
    yield from _needles(models)
    yield from _tasks(models)
    yield from _key_tokens(models)
    yield from _defined(models)


def number(run: RunData) -> list[Number]:
    """The effective length at the top of the page: of the final model, beside the original's."""
    shown, original = run.final or run.original, run.original
    if shown is None or shown.effective is None:
        return []
    before = original.effective if original and original is not shown else None
    detail = f"tokens, the original's {words.count(before.length)}" if before else "tokens"
    return [Number("Effective length", words.count(shown.effective.length), detail)]


def cautions(run: RunData) -> list[str]:
    """A window that is longer than what is shown to be used, and tests that were not made."""
    shown = run.final or run.original
    found = shown.effective if shown else None
    if found is None:
        return []
    said = []
    if run.claimed_length and found.length < run.claimed_length:
        why = f" Stopped by {found.stopped_by}." if found.stopped_by else ""
        said.append(
            f"The effective length is {words.count(found.length)} tokens, less than the window of "
            f"{words.count(run.claimed_length)}.{why}"
        )
    if found.not_tested:
        said.append(f"The effective length was certified without: {'; '.join(found.not_tested)}.")
    return said


def short_context(run: RunData) -> Iterator[Figure]:
    """What the change cost within the original's window, paired token by token."""
    rows = [
        (
            words.count(row.length),
            model.label,
            words.number(row.before),
            words.number(row.after),
            words.interval(row.ratio, row.low, row.high),
            words.count(row.tokens),
        )
        for model in run.models
        for row in model.short_context
    ]
    if rows:
        unit = next(row.unit for model in run.models for row in model.short_context)
        yield Figure(
            "quality",
            "What it lost within the original's window",
            "The same tokens before and after, over all texts: the ratio of the two perplexities with its 95% "
            f"interval, paired token by token (bootstrap over each {unit}). An interval that holds 1 shows no loss.",
            Table(("context length", "model", "before", "after", "after / before", "tokens"), tuple(rows)),
        )


def _certificates(models: Sequence[ModelResult]) -> Iterator[Figure]:
    certified = [(model.label, model.effective) for model in models if model.effective]
    if not certified:
        return
    rows = [
        (
            words.count(test.length),
            label,
            "passed" if test.passed else "NOT PASSED",
            words.interval(test.tail, test.tail_low, test.tail_high),
            words.interval(test.gain, test.gain_low, test.gain_high),
            _needle_cell(test),
            _margins(test, found.native),
        )
        for label, found in certified
        for test in found.tests
    ]
    _, found = certified[0]
    said = "\n".join(
        f"{label}: effective length {words.count(one.length)} tokens. {certificate(one)}" for label, one in certified
    )
    headers = ("context length", "model", "result", "tail against native", "context gain, nats", "needle", "margins")
    yield Figure(
        "context",
        "Effective length",
        f"{said}\nA length passes when the last {words.count(found.tail)} tokens before it are predicted no worse than "
        f"at the native length of {words.count(found.native)} (interval not wholly above 1), context beyond the native "
        "one lowers the loss of the same tokens (interval above 0), and the needle is found nearly as often as within "
        f"it. A margin is by how much. Bootstrap over each {found.unit}, {words.count(found.documents)} documents.",
        Table(headers, tuple(rows)),
    )


def _needle_cell(test: LengthTests) -> str:
    if test.needle is None:
        return words.NONE
    needed = f" (needs {test.needle_bound:.2f})" if test.needle_bound is not None else ""
    return f"{test.needle:.2f}{needed}"


def _margins(test: LengthTests, native: int) -> str:
    """Only of tests that can fail: up to the native length the tail has nothing to prove."""
    units = {"tail": " nats", "gain": " nats", "needle": ""}
    found = [
        f"{name} {value:+.3f}{units[name]}"
        for name, value in test.margins.items()
        if name != "tail" or test.length > native
    ]
    return ", ".join(found) or words.NONE


def _gains(models: Sequence[ModelResult]) -> Iterator[Figure]:
    rows, native, unit = [], 0, ""
    for model in models:
        for row in model.long_context.context_gain if model.long_context else ():
            native, unit = row.native, row.unit
            gain = words.interval(row.gain, row.low, row.high)
            rows.append((words.count(row.length), row.kind, model.label, gain, words.count(row.tokens)))
    if rows:
        yield Figure(
            "context",
            "Context gain",
            f"What context beyond {words.count(native)} tokens saves, in nats a token: the loss with the native "
            "context less the loss with all of the context, on the same tokens; above 0 the longer context helps. 95% "
            f"intervals, paired, bootstrap over each {unit}.",
            Table(("context length", "text", "model", "context gain, nats", "tokens"), tuple(rows)),
        )


def _needles(models: Sequence[ModelResult]) -> Iterator[Figure]:
    for model in models:
        found = model.long_context.needle if model.long_context else None
        if found is None:
            continue
        title = f"{'Passkey' if found.test == 'passkey' else 'Needle'} in a haystack: {model.label}"
        grid = _grid(found)
        cells = {place: (share, f"{share:.0%}\n{loss:.2g} nats") for place, (share, _, loss, _) in grid.items()}
        rows = [
            (words.count(length), f"{depth:.0%}", f"{share:.0%}", f"{exact:.0%}", words.number(loss), f"{margin:+.2f}")
            for (length, depth), (share, exact, loss, margin) in grid.items()
        ]
        headers = ("context length", "depth", "tokens found", "exact answers", "answer loss, nats", "margin, nats")
        yield Figure(
            "context",
            title,
            "A fact is put into a text at each depth (0%: its beginning) and asked for at its end. Share of the "
            "answer's tokens that are found, and the loss of the right answer; the darker, the less is found. Margin, "
            "in the data: how much more a wrong answer loses.",
            Table(headers, tuple(rows)),
            charts.heat_map(f"needle-{model.label}", found.lengths, found.depths, cells, title=title),
        )


def _grid(found: NeedleResult) -> dict[tuple[int, float], tuple[float, float, float, float]]:
    """By (length, depth): means of tokens found, exact answers, answer loss and margin over the samples."""
    grid = {}
    for length in found.lengths:
        for depth in found.depths:
            answers = [cell.answer for cell in found.cells if (cell.length, cell.depth) == (length, depth)]
            values = [(a.token_match, float(a.starts), a.loss, a.margin) for a in answers]
            share, exact, loss, margin = (float(value) for value in np.mean(values, axis=0))
            grid[length, depth] = (share, exact, loss, margin)
    return grid


def _tasks(models: Sequence[ModelResult]) -> Iterator[Figure]:
    rows = [
        (
            row.task,
            words.count(row.length),
            model.label,
            f"{row.recall:.0%}",
            f"{row.preferred:.0%}",
            words.number(row.loss),
            f"{row.margin:+.2f}",
            words.count(row.questions),
        )
        for model in models
        if model.long_context and model.long_context.ruler
        for row in model.long_context.ruler.rows
    ]
    headers = (
        "task",
        "context length",
        "model",
        "recall",
        "preferred",
        "answer loss, nats",
        "margin, nats",
        "questions",
    )
    if rows:
        yield Figure(
            "context",
            "RULER tasks",
            "Recall: share of the expected answers in the generated text. Preferred: share of questions whose right "
            "answer loses less than a wrong one from the same text. Sized for small models: not the leaderboard's "
            "numbers.",
            Table(headers, tuple(rows)),
        )


def _key_tokens(models: Sequence[ModelResult]) -> Iterator[Figure]:
    rows = [
        (
            words.count(row.length),
            row.kind,
            model.label,
            words.interval(row.ppl, row.low, row.high),
            f"{words.count(row.key_tokens)} of {words.count(row.tokens)}",
            row.keys_from,
        )
        for model in models
        if model.long_context
        for row in model.long_context.long_ppl
    ]
    if rows:
        yield Figure(
            "context",
            "LongPPL",
            "Perplexity of the key tokens alone: those that the long context makes predictable.",
            Table(("context length", "text", "model", "LongPPL", "key tokens", "chosen by"), tuple(rows)),
        )


def _defined(models: Sequence[ModelResult]) -> Iterator[Figure]:
    rows = [
        (
            row.definition,
            words.count(row.length),
            model.label,
            words.count(row.stride),
            words.interval(row.ppl, row.low, row.high),
            words.number(row.bits_per_byte),
            words.count(row.tokens),
        )
        for model in models
        if model.long_context
        for row in model.long_context.defined
    ]
    if rows:
        yield Figure(
            "context",
            "Perplexity as others define it",
            "The same texts, each definition with its own windows and its own mean; comparable with tables that use "
            "it, not between definitions.",
            Table(
                ("definition", "context length", "model", "stride", "perplexity", "bits per byte", "tokens"),
                tuple(rows),
            ),
        )
