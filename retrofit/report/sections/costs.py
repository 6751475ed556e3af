"""What it costs to run a model: memory of the KV cache, and speed."""

from __future__ import annotations

from collections.abc import Iterator

from retrofit import format as fmt
from retrofit.report.charts import plots
from retrofit.report.charts.drawing import Line
from retrofit.report.data import ModelResult, RunData
from retrofit.report.parts import Figure, Number, Table


def figures(run: RunData) -> Iterator[Figure]:
    """The section `cost`."""
    yield from _cache(run)
    yield from _running(run)


def memory(run: RunData) -> Table:
    """KV-cache bytes at each number of tokens."""
    models = _with_cache(run)
    lengths = sorted({tokens for model in models for tokens in model.kv_cache_bytes})
    rows = [
        (_named(run, length), *(fmt.nbytes(model.kv_cache_bytes.get(length)) for model in models)) for length in lengths
    ]
    return Table(("tokens in the cache", *(model.label for model in models)), tuple(rows))


def _named(run: RunData, length: int) -> str:
    return f"{fmt.count(length)} (the window)" if length == run.claimed_length else fmt.count(length)


def _with_cache(run: RunData) -> list[ModelResult]:
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
    caption = (
        "What one sequence of this many tokens keeps in memory while text is generated, in the checkpoint's dtype. "
        "Computed from the configuration; what was measured stands with the speed."
    )
    yield Figure("cost", title, caption, table, picture)


def number(run: RunData) -> list[Number]:
    """The speed of decoding at the longest context that both models were measured at."""
    before, after = (_decoded(model) if model else {} for model in (run.original, run.final))
    both = sorted(set(before) & set(after))
    if not both:
        return []
    old, new = before[both[-1]], after[both[-1]]
    detail = f"{fmt.number(old)} → {fmt.number(new)} tokens/s after {fmt.count(both[-1])} tokens"
    return [Number("Decoding speed", fmt.times(new / old), detail)]


def _decoded(model: ModelResult) -> dict[int, float]:
    """Decoded tokens a second by context length."""
    return {one.length: one.decode_per_s for one in model.cost.lengths if one.decode_per_s} if model.cost else {}


def running(run: RunData) -> Table:
    """Everything measured at each context length, with the most that the machine could do in brackets."""
    rows = [
        (
            fmt.count(one.length),
            model.label,
            f"{fmt.nbytes(one.kv_bytes)} (spec: {fmt.nbytes(one.kv_bytes_expected)})",
            f"{one.prefill_seconds:.2f} s",
            f"{fmt.number(one.prefill_per_s)} [{fmt.number(one.prefill_bound)}]",
            f"{fmt.number(one.decode_per_s)} [{fmt.number(one.decode_bound)}]" if one.decode_per_s else fmt.NONE,
            fmt.nbytes(one.prefill_bytes),
        )
        for model in run.models
        if model.cost
        for one in model.cost.lengths
    ]
    headers = (
        "context length",
        "model",
        "KV cache",
        "first token after",
        "prefill tokens/s",
        "decode tokens/s",
        "memory of the prefill",
    )
    return Table(headers, tuple(sorted(rows, key=lambda row: int(row[0].replace(",", "")))))


def _running(run: RunData) -> Iterator[Figure]:
    measured = [(model.label, model.cost) for model in (run.original, run.final) if model is not None and model.cost]
    if not measured:
        return
    _, cost = measured[-1]
    said = (
        f"One sequence, {cost.dtype}, kernel {cost.kernel}, on the {cost.device} of this run. In brackets, and dashed "
        f"in the chart, the most that it could do: decoding reads {fmt.nbytes(cost.weight_bytes)} of weights and the "
        f"whole KV cache for each token, at {fmt.nbytes(cost.bytes_per_second)}/s measured with a large copy; a "
        f"prefill multiplies, at {fmt.number(cost.flops_per_second / 1e9)} GFLOP/s measured with large matrices. "
        "First token after: the time of the prefill. Its memory is what it held at its peak beyond the weights. The "
        "models were measured in turn, twice, and the faster time counts."
    )
    decoded = {model.label: _decoded(model) for model in (run.original, run.final) if model is not None}
    lines = [Line(label, list(found), list(found.values())) for label, found in decoded.items() if found]
    title = "Speed and memory by context length"
    picture = None
    if lines:
        bounds = [
            Line(label, [x.length for x in one.lengths], [x.decode_bound for x in one.lengths])
            for label, one in measured
        ]
        picture = plots.decode_by_context("decode", lines, bounds, title=title)
    yield Figure("cost", title, said, running(run), picture)
