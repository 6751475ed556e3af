"""Whether the long context is used: the certificate of the effective length, and everything that speaks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrofit import format as fmt
from retrofit.evaluation.metrics.effective import TAIL_MARGIN, certificate, yardstick
from retrofit.evaluation.result import ModelEvaluation
from retrofit.report.charts import plots
from retrofit.report.data import RunData
from retrofit.report.parts import Figure, Number, Table

if TYPE_CHECKING:
    from retrofit.evaluation.metrics.effective import LengthTests
    from retrofit.evaluation.tasks.needle import NeedleResult

NOT_ASKED = "not asked"


def figures(run: RunData) -> Iterator[Figure]:
    """The section `context`: of the original and of the final model, what was asked for."""
    models = [model for model in (run.original, run.final) if model is not None and model.long_context]
    yield from _certificates(models)
    yield from _gains(models, run.seen)
    yield from _needles(models)
    yield from _tasks(models)
    yield from _key_tokens(models, run.seen)
    yield from _defined(models)


def number(run: RunData) -> list[Number]:
    """The effective length at the top of the page: of the final model, beside the original's."""
    shown, original = run.final or run.original, run.original
    if shown is None or shown.effective is None:
        return []
    before = original.effective if original and original is not shown else None
    detail = f"tokens, the original's {fmt.count(before.length)}" if before else "tokens"
    return [Number("Effective length", fmt.count(shown.effective.length), detail)]


def cautions(run: RunData) -> list[str]:
    """A context length beyond what is shown to be used, and tests that were not made."""
    shown = run.final or run.original
    found = shown.effective if shown else None
    if found is None:
        return []
    sentences = []
    if run.claimed_length and found.length < run.claimed_length:
        why = f" Stopped by {found.stopped_by}. {yardstick(found)}".rstrip() if found.stopped_by else ""
        sentences.append(
            f"The effective length is {fmt.count(found.length)} tokens, less than the context of "
            f"{fmt.count(run.claimed_length)}.{why}"
        )
    if found.not_tested:
        sentences.append(f"The effective length was certified without: {'; '.join(found.not_tested)}.")
    return sentences


def short_context(run: RunData) -> Iterator[Figure]:
    """What the change cost within the original's context length, paired token by token."""
    rows = [
        (
            fmt.count(row.length),
            model.label,
            fmt.number(row.before),
            fmt.number(row.after),
            fmt.interval(row.ratio, row.low, row.high),
            fmt.count(row.tokens),
        )
        for model in run.models
        for row in model.short_context
    ]
    if rows:
        unit = next(row.unit for model in run.models for row in model.short_context)
        yield Figure(
            "quality",
            "What it lost within the original's context length",
            "The same tokens before and after, over all texts: the ratio of the two perplexities with its 95% "
            f"interval, paired token by token (bootstrap over each {unit}). An interval that holds 1 does not show "
            "that nothing was lost: a loss of up to its upper end is compatible with the data.",
            Table(("context length", "model", "before", "after", "after / before", "tokens"), tuple(rows)),
        )


def _certificates(models: Sequence[ModelEvaluation]) -> Iterator[Figure]:
    certified = [(model.label, model.effective) for model in models if model.effective]
    if not certified:
        return
    rows = [
        (
            fmt.count(test.length),
            label,
            "passed" if test.passed else "NOT PASSED",
            fmt.interval(test.tail, test.tail_low, test.tail_high),
            fmt.interval(test.gain, test.gain_low, test.gain_high),
            _needle_cell(test),
            _margins(test),
        )
        for label, found in certified
        for test in found.tests
    ]
    _, found = certified[-1]
    table = "\n".join(
        f"{label}: effective length {fmt.count(one.length)} tokens. {certificate(one)}" for label, one in certified
    )
    control = next((one.control for _, one in certified if one.control), "")
    tail = (
        f"the last {fmt.count(found.tail)} tokens before it are predicted as well as at that length (ratio of "
        f"perplexities, set against {control}; interval below {1 + TAIL_MARGIN}), "
        if control
        else ""
    )
    unit = next((one.unit for _, one in certified if one.unit), "")
    resampled = (
        f"Bootstrap over each {unit}, {fmt.count(found.documents)} document{'s' * (found.documents != 1)}."
        if unit
        else ""
    )
    headers = ("context length", "model", "result", "tail", "context gain, nats", "needle", "margins")
    yield Figure(
        "context",
        "Effective length",
        f"{table}\nA length beyond the native {fmt.count(found.native)} passes when {tail}context beyond the native "
        "one lowers the loss of the same tokens (interval above 0), and the needle is found nearly as often as within "
        f"it; a test that was not made stands as {fmt.NONE}. A margin is by how much it passed. {resampled}",
        Table(headers, tuple(rows)),
    )


def _needle_cell(test: LengthTests) -> str:
    if test.needle is None:
        return fmt.NONE
    needed = f" (needs {test.needle_bound:.2f})" if test.needle_bound is not None else ""
    return f"{test.needle:.2f}{needed}"


def _margins(test: LengthTests) -> str:
    units = {"tail": " nats", "gain": " nats", "needle": ""}
    return ", ".join(f"{name} {value:+.3f}{units[name]}" for name, value in test.margins.items()) or fmt.NONE


def _gains(models: Sequence[ModelEvaluation], seen: Mapping[str, tuple[str, ...]]) -> Iterator[Figure]:
    rows, unit = [], ""
    for model in models:
        for row in model.long_context.context_gain if model.long_context else ():
            unit = row.unit
            gain = fmt.interval(row.gain, row.low, row.high)
            lengths = fmt.count(row.length), fmt.count(row.context)
            rows.append((*lengths, fmt.kind(row.kind, seen), model.label, gain, fmt.count(row.tokens)))
    if rows:
        yield Figure(
            "context",
            "Context gain",
            "What a longer context saves, in nats a token: the loss with as much context as the second column says "
            "less the loss with all of it, on the same tokens; above 0 the longer context helps. Beyond the native "
            "length it is set against the native context, and at that length against half of it: what the text gives a "
            f"model within its own window. 95% intervals, paired, bootstrap over each {unit}.",
            Table(("context length", "against", "text", "model", "context gain, nats", "tokens"), tuple(rows)),
        )


def _missing(model: ModelEvaluation, lengths: Iterable[int]) -> tuple[int, ...]:
    """Those of `lengths` that the model was not asked at, as its context does not hold them."""
    asked = set(model.long_context.not_asked) if model.long_context else set()
    return tuple(sorted(asked.intersection(lengths)))


def _unasked(models: Sequence[ModelEvaluation], lengths: Iterable[int]) -> str:
    """Which models were not asked at which of the lengths, as sentences after others."""
    lengths = tuple(lengths)
    found = [(model.label, missing) for model in models if (missing := _missing(model, lengths))]
    return "".join(
        f" `{label}` was not asked at {', '.join(map(fmt.count, missing))} tokens: its context is shorter."
        for label, missing in found
    )


def _needles(models: Sequence[ModelEvaluation]) -> Iterator[Figure]:
    tests = [model.long_context.needle for model in models if model.long_context and model.long_context.needle]
    lengths = {length for test in tests for length in test.lengths}
    for model in models:
        found = model.long_context.needle if model.long_context else None
        if found is None:
            continue
        title = f"{'Passkey' if found.test == 'passkey' else 'Needle'} in a haystack: {model.label}"
        grid, missing = _grid(found), _missing(model, lengths)
        cells = {place: (one.found, f"{one.found:.0%}\n{one.loss:.2g} nats") for place, one in grid.items()}
        rows: list[tuple[str, ...]] = [
            (
                fmt.count(length),
                f"{depth:.0%}",
                f"{one.found:.0%}",
                f"{one.exact:.0%}",
                fmt.number(one.loss),
                f"{one.margin:+.2f}",
            )
            for (length, depth), one in grid.items()
        ]
        rows += [(fmt.count(length), NOT_ASKED, *[fmt.NONE] * 4) for length in missing]
        headers = ("context length", "depth", "found", "exact answers", "answer loss, nats", "margin, nats")
        multi_key = found.multi_key and len(found.depths) > 1
        counts = (
            f"The facts of all depths stand in one text. Found: the right answer loses less than that of every other "
            f"fact, which chance does once in {len(found.depths)}"
            if multi_key
            else "Found: the generated answer is the right one"
        )
        yield Figure(
            "context",
            title,
            f"A fact is put into a text at each depth (0%: its beginning) and asked for at its end. {counts}; below it "
            "the loss of the right answer; the darker, the less is found. Exact answers are generated ones. Margin: "
            f"how much more the likeliest wrong answer loses.{_unasked(models, lengths)}",
            Table(headers, tuple(rows)),
            plots.heat_map(f"needle-{model.label}", (*found.lengths, *missing), found.depths, cells, title=title),
        )


@dataclass(frozen=True)
class _Found:
    """Means over the samples of one length and depth."""

    found: float
    exact: float
    loss: float
    margin: float


def _grid(needle: NeedleResult) -> dict[tuple[int, float], _Found]:
    """By (length, depth)."""
    grid = {}
    for length in needle.lengths:
        for depth in needle.depths:
            cells = [cell for cell in needle.cells if (cell.length, cell.depth) == (length, depth)]
            values = [(cell.found, cell.answer.starts, cell.answer.loss, cell.answer.margin) for cell in cells]
            grid[length, depth] = _Found(*(float(value) for value in np.mean(values, axis=0)))
    return grid


def _tasks(models: Sequence[ModelEvaluation]) -> Iterator[Figure]:
    tests = [model.long_context.ruler for model in models if model.long_context and model.long_context.ruler]
    lengths = {row.length for test in tests for row in test.rows}
    rows: list[tuple[str, ...]] = [
        (
            row.task,
            fmt.count(row.length),
            model.label,
            f"{row.recall:.0%}",
            f"{row.preferred:.0%}",
            fmt.number(row.loss),
            f"{row.margin:+.2f}",
            fmt.count(row.questions),
        )
        for model in models
        if model.long_context and model.long_context.ruler
        for row in model.long_context.ruler.rows
    ]
    rows += [
        ("all", fmt.count(length), model.label, NOT_ASKED, *[fmt.NONE] * 4)
        for model in models
        for length in _missing(model, lengths)
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
            f"numbers.{_unasked(models, lengths)}",
            Table(headers, tuple(rows)),
        )


def _key_tokens(models: Sequence[ModelEvaluation], seen: Mapping[str, tuple[str, ...]]) -> Iterator[Figure]:
    rows = [
        (
            fmt.count(row.length),
            fmt.kind(row.kind, seen),
            model.label,
            fmt.interval(row.ppl, row.low, row.high),
            f"{fmt.count(row.key_tokens)} of {fmt.count(row.tokens)}",
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


def _defined(models: Sequence[ModelEvaluation]) -> Iterator[Figure]:
    rows = [
        (
            row.definition,
            fmt.count(row.length),
            model.label,
            fmt.count(row.stride),
            fmt.interval(row.ppl, row.low, row.high),
            fmt.number(row.bits_per_byte),
            fmt.count(row.tokens),
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
