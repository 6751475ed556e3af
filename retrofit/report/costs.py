"""What it costs to run a model: memory of the KV cache, and speed."""

from __future__ import annotations

from collections.abc import Iterator

from retrofit.report import charts, words
from retrofit.report.data import ModelResult, RunData
from retrofit.report.parts import Figure, Table


def figures(run: RunData) -> Iterator[Figure]:
    """The section `cost`."""
    yield from _cache(run)
    yield from _speed(run)


def memory(run: RunData) -> Table:
    """KV-cache bytes at each number of tokens."""
    models = _with_cache(run)
    lengths = sorted({tokens for model in models for tokens in model.kv_cache_bytes})
    rows = [
        (words.count(length), *(words.size(model.kv_cache_bytes.get(length)) for model in models)) for length in lengths
    ]
    return Table(("tokens in the cache", *(model.label for model in models)), tuple(rows))


def _with_cache(run: RunData) -> list[ModelResult]:
    return [model for model in (run.original, run.final) if model is not None and model.kv_cache_bytes]


def _cache(run: RunData) -> Iterator[Figure]:
    table = memory(run)
    if not table.rows:
        return
    models = _with_cache(run)
    lengths = sorted({tokens for model in models for tokens in model.kv_cache_bytes})
    groups = {
        model.label: {f"{words.tokens(length)} tokens": model.kv_cache_bytes.get(length) for length in lengths}
        for model in models
    }
    title = "Memory of the KV cache"
    picture = charts.bars("cache", groups, label="bytes for one sequence", show=words.size, title=title)
    caption = (
        "What one sequence of this many tokens keeps in memory while text is generated, in the checkpoint's dtype."
    )
    yield Figure("cost", title, caption, table, picture)


def speed(run: RunData) -> Table:
    """Decoded tokens a second."""
    rows = [(model.label, words.number(model.decode_tokens_per_s)) for model in run.models if model.decode_tokens_per_s]
    return Table(("model", "decoded tokens/s"), tuple(rows))


def _speed(run: RunData) -> Iterator[Figure]:
    table = speed(run)
    if not table.rows:
        return
    groups = {model.label: {"": model.decode_tokens_per_s} for model in run.models if model.decode_tokens_per_s}
    title = "Decoding speed"
    picture = charts.bars("speed", groups, label="tokens per second, higher is better", show=words.number, title=title)
    caption = "Tokens generated per second on the machine of this run, one sequence at a time."
    yield Figure("cost", title, caption, table, picture)
