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
        yield from _rounds(report["choice"])
    yield sentences.layers(report)
    yield sentences.sinks(report)
    yield sentences.losses(report)


def prices(result: WindowList) -> Iterator[Part]:
    """`retrofit plan --windows`."""
    yield from _rounds(asdict(result.choice))
    lengths = list(result.prices[0].kv_cache_bytes)
    further = [part for part in ("needles", "keys") if getattr(result.choice.rise, part) is not None]
    rows = [
        (
            "none" if price.size is None else f"{price.size:,}",
            "all" if price.size is None else f"{len(price.full_layers)}: {ranges(price.full_layers) or 'none'}",
            *(nbytes(price.kv_cache_bytes[length]) for length in lengths),
            f"{price.text:+.3f}",
            f"{price.answers:+.3f}",
            *(f"{getattr(price, part) or 0.0:+.3f}" for part in further),
            price.how,
        )
        for price in result.prices
    ]
    columns = [
        "window",
        "full layers",
        *(f"KV at {length // 1024}k" for length in lengths),
        "text",
        "answers",
        *further,
        "",
    ]
    yield Table(f"{result.model} as {result.target}: what sliding windows save, and add to the loss", columns, rows)
    yield (
        "nats per token of text beyond the window, and of passages, numbers and key tokens out of sight, before repair "
        f"and training; sinks fitted on {result.tokens:,} tokens of {', '.join(result.kinds)}, losses on "
        f"{result.measured_tokens:,} others"
    )
    for note in result.notes:
        yield f"{NOTE}{note}"
    yield f"\nmeasured with windows of {result.size:,} tokens:\n  {result.command}"


def _rounds(choice: Mapping[str, Any]) -> Iterator[Part]:
    """What was measured, and on how many tokens, the layers whose windows cost most first."""
    tokens = choice["tokens"]
    for number, one in enumerate(choice["rounds"], start=1):
        before = (
            f"with windows in {sentences.counted(one['windowed'])} ({sentences.rise(one['rise'])})"
            if one["windowed"]
            else "alone"
        )
        costliest = sorted(one["added"].items(), key=lambda item: -(item[1]["far"] + item[1]["answers"]))[:8]
        parts = sentences.measured(one["rise"])
        yield Table(
            f"Round {number}: nats per token that the window of a layer adds, {before}",
            ["layer", *(f"{sentences.PARTS[part]} ({tokens[part]:,})" for part in parts)],
            [(layer, *(f"{added[part]:+.3f}" for part in parts)) for layer, added in costliest],
        )
