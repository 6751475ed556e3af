"""What it costs to run a model: memory of the KV cache, and speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from retrofit import format as fmt
from retrofit.evaluation.cache_change import divided
from retrofit.evaluation.result import ModelEvaluation
from retrofit.evaluation.running import decoding_change, speed_change
from retrofit.model.cache_dtype import served_with
from retrofit.report.charts import plots
from retrofit.report.charts.drawing import Line
from retrofit.report.data import RunData
from retrofit.report.parts import Figure, Number, Table

if TYPE_CHECKING:
    from retrofit.evaluation.running import BatchCost, LengthCost


def figures(run: RunData) -> Iterator[Figure]:
    """The section `cost`."""
    yield from _cache(run)
    yield from _running(run)
    yield from _together(run)


def memory(run: RunData) -> Table:
    """KV-cache bytes at each number of tokens, and how many times smaller they became."""
    models = _with_cache(run)
    lengths = sorted({tokens for model in models for tokens in model.kv_cache_bytes})
    rows = []
    for length in lengths:
        sizes = [model.kv_cache_bytes.get(length) for model in models]
        before, *after = sizes
        smaller = [divided(before / last) if before and last else fmt.NONE for last in after]
        rows.append((_named(run, length), *map(fmt.nbytes, sizes), *smaller))
    more = ("smaller",) if len(models) > 1 else ()
    return Table(("tokens in the cache", *(model.label for model in models), *more), tuple(rows))


def _named(run: RunData, length: int) -> str:
    return f"{fmt.count(length)} (the context length)" if length == run.claimed_length else fmt.count(length)


def _with_cache(run: RunData) -> list[ModelEvaluation]:
    return [model for model in (run.original, run.final) if model is not None and model.kv_cache_bytes]


def _cache(run: RunData) -> Iterator[Figure]:
    table = memory(run)
    if not table.rows:
        return
    models = _with_cache(run)
    lengths = sorted({tokens for model in models for tokens in model.kv_cache_bytes})
    groups = {
        model.label: {f"{fmt.tokens(length)} tokens": model.kv_cache_bytes.get(length) for length in lengths}
        for model in models
    }
    title = "Memory of the KV cache"
    picture = plots.bars("cache", groups, label="bytes for one sequence", show=fmt.nbytes, title=title)
    served = served_with(models[-1].kv_cache_dtype)
    caption = (
        "What one sequence of this many tokens keeps in memory while text is generated"
        f"{'' if served else ', in the checkpoint' + chr(39) + 's dtype'}. "
        f"Computed from the configuration; what was measured stands with the speed. {served}"
    ).strip()
    yield Figure("cost", title, caption, table, picture)


def number(run: RunData) -> list[Number]:
    """The speed of decoding, where the rounds tell both models apart at every length they were measured at."""
    pairs = _decoded(run)
    changes = [decoding_change(before, after) for before, after in pairs]
    found = [change.ratio for change in changes if change is not None]
    if not found or len(found) < len(pairs):
        return []
    least, most = fmt.times(min(found)), fmt.times(max(found))
    detail = "; ".join(
        f"{fmt.number(before.decode_per_s)} → {fmt.number(after.decode_per_s)} after {fmt.count(before.length)}"
        for before, after in pairs
    )
    value = least if least == most else f"{least} to {most}"
    return [Number("Decoding speed", value, f"tokens/s {detail} tokens")]


def decoding(run: RunData) -> str:
    """A sentence for every length at which both models decoded: how much faster, or that no difference was measured."""
    sentences = []
    for before, after in _decoded(run):
        change = decoding_change(before, after)
        rounds = f"{_range(before.decode_rounds)} → {_range(after.decode_rounds)} tokens/s"
        if change is None:
            what = f"no difference could be measured here ({rounds}: the rounds do not tell the models apart)"
        else:
            interval = f"{fmt.times(change.low)} to {fmt.times(change.high)}"
            what = f"{fmt.times(change.ratio)} the original's speed, {interval} over the rounds ({rounds})"
        sentences.append(f"Decoding after {fmt.count(before.length)} tokens: {what}.")
    return " ".join(sentences)


def _decoded(run: RunData) -> list[tuple[LengthCost, LengthCost]]:
    """(original, final model) at each length at which both decoded."""
    if run.original is None or run.final is None or not run.original.cost or not run.final.cost:
        return []
    after = {one.length: one for one in run.final.cost.lengths if one.decode_rounds}
    return [(one, after[one.length]) for one in run.original.cost.lengths if one.decode_rounds and one.length in after]


def _range(values: Sequence[float]) -> str:
    least, most = fmt.number(min(values)), fmt.number(max(values))
    return least if least == most else f"{least} to {most}"


def _spread(value: float | None, rounds: Sequence[float]) -> str:
    """A median, and in brackets what the rounds gave."""
    if value is None or not rounds:
        return fmt.NONE
    return f"{fmt.number(value)} ({_range(rounds)})" if len(rounds) > 1 else fmt.number(value)


def running(run: RunData) -> Table:
    """Everything measured at each context length, with the most that the machine could do beside it."""
    measured = [(one, model.label) for model in run.models if model.cost for one in model.cost.lengths]
    rows = [
        (
            fmt.count(one.length),
            label,
            f"{fmt.nbytes(one.kv_bytes)} (spec: {fmt.nbytes(one.kv_bytes_expected)})",
            _spread(one.prefill_seconds, one.prefill_rounds),
            fmt.number(one.prefill_per_s),
            fmt.number(one.prefill_bound),
            _spread(one.decode_per_s, one.decode_rounds),
            fmt.number(one.decode_bound),
            fmt.nbytes(one.prefill_bytes),
        )
        for one, label in sorted(measured, key=lambda found: found[0].length)
    ]
    headers = (
        "context length",
        "model",
        "KV cache",
        "first token after, s",
        "prefill tokens/s",
        "at most",
        "decode tokens/s",
        "at most",
        "memory of the prefill",
    )
    return Table(headers, tuple(rows))


def _running(run: RunData) -> Iterator[Figure]:
    measured = [(model.label, model.cost) for model in (run.original, run.final) if model is not None and model.cost]
    if not measured:
        return
    _, cost = measured[-1]
    rounds = max(len(one.prefill_rounds) for one in cost.lengths)
    turns = (
        f"The models were measured in turn, {rounds} times over: the median, and in brackets the least and the most. "
    )
    sentences = (
        f"{decoding(run)} One sequence, {cost.dtype}, kernel {cost.kernel}, on the {cost.device} of this run. "
        f"{turns if rounds > 1 else ''}At most (dashed in the chart): what the machine could do; decoding reads "
        f"{fmt.nbytes(cost.weight_bytes)} of weights and the whole KV cache for each token, at "
        f"{fmt.nbytes(cost.bytes_per_second)}/s measured with a large copy; a prefill multiplies, at "
        f"{fmt.number(cost.flops_per_second / 1e9)} GFLOP/s measured with large matrices. First token after: the "
        "time of the prefill. Its memory is what it held at its peak beyond the weights."
    ).strip()
    title = "Speed and memory by context length"
    lines, bounds = [], []
    for label, one in measured:
        decoded = [at for at in one.lengths if at.decode_per_s is not None]
        if len(decoded) > 1:
            spans = [(min(at.decode_rounds), max(at.decode_rounds)) for at in decoded]
            lines.append(Line(label, [at.length for at in decoded], [at.decode_per_s or 0.0 for at in decoded], spans))
            bounds.append(Line(label, [at.length for at in one.lengths], [at.decode_bound for at in one.lengths]))
    picture = plots.decode_by_context("decode", lines, bounds, title=title) if lines else None
    yield Figure("cost", title, sentences, running(run), picture)


def together(run: RunData) -> Table:
    """Speeds of decoding several sequences at once, at each context length."""
    measured = [
        (one.length, batch, model.label)
        for model in run.models
        if model.cost
        for one in model.cost.lengths
        for batch in one.batches
    ]
    rows = [
        (
            fmt.count(length),
            fmt.count(one.batch),
            label,
            fmt.nbytes(one.kv_bytes),
            _spread(one.loop_per_s, one.loop_rounds),
            _spread(one.graph_per_s, one.graph_rounds),
            fmt.number(one.decode_bound),
            one.note or fmt.NONE,
        )
        for length, one, label in sorted(measured, key=lambda found: (found[0], found[1].batch))
    ]
    headers = (
        "context length",
        "sequences",
        "model",
        "KV cache",
        "launched from Python, tokens/s",
        "CUDA graph, tokens/s",
        "at most",
        "note",
    )
    return Table(headers, tuple(rows))


def decoding_together(run: RunData) -> str:
    """A sentence for every length at which both models decoded as a CUDA graph: tokens per second, old and new."""
    sentences = []
    for length, pairs in _graphs(run):
        parts = []
        for old, new in pairs:
            change = speed_change(old.graph_rounds, new.graph_rounds)
            factor = "no difference that the rounds tell" if change is None else fmt.times(change.ratio)
            speeds = f"{fmt.number(old.graph_per_s)} → {fmt.number(new.graph_per_s)}"
            parts.append(f"{fmt.count(new.batch)} at once {speeds} ({factor})")
        sentences.append(f"Decoding as a CUDA graph after {fmt.count(length)} tokens, tokens/s: {', '.join(parts)}.")
    return " ".join(sentences)


def _graphs(run: RunData) -> list[tuple[int, list[tuple[BatchCost, BatchCost]]]]:
    """By length, (original, final model) for each batch that both decoded as a graph."""
    if run.original is None or run.final is None or not run.original.cost or not run.final.cost:
        return []
    after = {(at.length, one.batch): one for at in run.final.cost.lengths for one in at.batches if one.graph_rounds}
    found = [
        (
            at.length,
            [(one, after[key]) for one in at.batches if one.graph_rounds and (key := (at.length, one.batch)) in after],
        )
        for at in run.original.cost.lengths
    ]
    return [(length, pairs) for length, pairs in found if pairs]


def _together(run: RunData) -> Iterator[Figure]:
    table = together(run)
    if not table.rows:
        return
    caption = (
        f"{decoding_together(run)} Tokens per second of all sequences together, over a cache of fixed size. Launched "
        "from Python: every kernel of every step anew, which takes longer than the kernels of a small model. CUDA "
        "graph: the step captured once and replayed, which is what a serving engine does. At most: what memory "
        "bandwidth allows, weights read once and every sequence's KV cache for each step; the more sequences, the more "
        "of that is the cache."
    ).strip()
    yield Figure("cost", "Sequences decoded together", caption, table, None)
