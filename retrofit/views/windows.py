"""What is shown of windows: which layers have them, how these were found, and what the loss rises by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from retrofit.model.inspect import ranges
from retrofit.tables import Part, Table

_PARTS = {"near": "text inside the window", "far": "text beyond it", "answers": "passages out of sight"}


def conversion(report: Mapping[str, Any]) -> Iterator[Part]:
    """What `retrofit window` did, from its report as JSON values."""
    if report["choice"]:
        yield from _rounds(report["choice"]["rounds"])
    full, size = report["full_layers"], report["size"]
    windowed = [layer["index"] for layer in report["layers"] if layer["index"] not in full]
    yield f"windows of {size:,} tokens in layers {ranges(windowed)}; layers {ranges(full) or 'none'} see everything"
    tokens = f"on {report['measured_tokens']:,} tokens that nothing was fitted on"
    yield f"nats per token before any training, {tokens}: {_rise(report['rise'])}"


def _rise(rise: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {rise[part]:+.3f}" for part, what in _PARTS.items())


def _rounds(rounds: list[Mapping[str, Any]]) -> Iterator[Part]:
    """What was measured, the layers whose windows cost most first."""
    for number, one in enumerate(rounds, start=1):
        before = f"with windows in {len(one['windowed'])} layers ({_rise(one['rise'])})" if one["windowed"] else "alone"
        dearest = sorted(one["added"].items(), key=lambda item: -(item[1]["far"] + item[1]["answers"]))[:8]
        yield Table(
            f"Round {number}: nats per token that the window of a layer adds, {before}",
            ["layer", *_PARTS.values()],
            [(layer, *(f"{added[part]:+.3f}" for part in _PARTS)) for layer, added in dearest],
        )
