"""What is shown of windows: which layers have them, how these were found, and what the loss rises by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from retrofit.format import nbytes
from retrofit.model.inspect import ranges
from retrofit.tables import NOTE, Part, Table
from retrofit.windows import sentences

if TYPE_CHECKING:
    from retrofit.windows.price_list import WindowList


def conversion(report: Mapping[str, Any]) -> Iterator[Part]:
    """What `retrofit window` did, from its report as JSON values."""
    if report["choice"]:
        yield from _rounds(report["choice"]["rounds"])
    yield sentences.layers(report)
    yield sentences.sinks(report)
    yield sentences.losses(report)


def prices(result: WindowList) -> Iterator[Part]:
    """`retrofit plan --windows`."""
    yield from _rounds([asdict(one) for one in result.choice.rounds])
    lengths = list(result.prices[0].kv_cache_bytes)
    rows = [
        (
            "none" if price.size is None else f"{price.size:,}",
            "all" if price.size is None else f"{len(price.full_layers)}: {ranges(price.full_layers) or 'none'}",
            *(nbytes(price.kv_cache_bytes[length]) for length in lengths),
            f"{price.text:+.3f}",
            f"{price.answers:+.3f}",
            price.how,
        )
        for price in result.prices
    ]
    columns = ["window", "full layers", *(f"KV at {length // 1024}k" for length in lengths), "text", "answers", ""]
    yield Table(f"{result.model} as {result.target}: what sliding windows save, and add to the loss", columns, rows)
    yield (
        "nats per token of text beyond the window and of passages out of sight, before repair and training; sinks "
        f"fitted on {result.tokens:,} tokens of {', '.join(result.kinds)}, losses on {result.measured_tokens:,} others"
    )
    for note in result.notes:
        yield f"{NOTE}{note}"
    yield f"\nmeasured with windows of {result.size:,} tokens:\n  {result.command}"


def _rounds(rounds: list[Mapping[str, Any]]) -> Iterator[Part]:
    """What was measured, the layers whose windows cost most first."""
    for number, one in enumerate(rounds, start=1):
        before = (
            f"with windows in {len(one['windowed'])} layers ({sentences.rise(one['rise'])})"
            if one["windowed"]
            else "alone"
        )
        costliest = sorted(one["added"].items(), key=lambda item: -(item[1]["far"] + item[1]["answers"]))[:8]
        yield Table(
            f"Round {number}: nats per token that the window of a layer adds, {before}",
            ["layer", *sentences.PARTS.values()],
            [(layer, *(f"{added[part]:+.3f}" for part in sentences.PARTS)) for layer, added in costliest],
        )
