"""What terminal, report and card say of a model's windows. found: the fields of a `WindowReport` as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrofit.model.inspect import ranges

PARTS = {
    "near": "text inside the window",
    "far": "text beyond it",
    "answers": "passages out of sight",
    "needles": "numbers out of sight",
    "keys": "key tokens",
}


def layers(found: Mapping[str, Any]) -> str:
    """Which layers have windows and which see everything."""
    return f"windows of {found['size']:,} tokens in {numbered(windowed(found))}; {full(found['full_layers'])}"


def numbered(indices: Sequence[int]) -> str:
    """Layers by their numbers: "layer 3", "layers 0-2, 5"."""
    return f"layer{'' if len(indices) == 1 else 's'} {ranges(indices)}"


def counted(indices: Sequence[int]) -> str:
    """How many layers: "1 layer", "12 layers"."""
    return f"{len(indices)} layer{'' if len(indices) == 1 else 's'}"


def full(indices: Sequence[int]) -> str:
    """Which layers see everything, as a clause."""
    if not indices:
        return "no layer sees everything"
    return f"{numbered(indices)} see{'s' if len(indices) == 1 else ''} everything"


def windowed(found: Mapping[str, Any]) -> list[int]:
    """Layers that have windows."""
    return [layer["index"] for layer in found["layers"] if layer["index"] not in found["full_layers"]]


def sinks(found: Mapping[str, Any]) -> str:
    """How many heads have a sink, and what became of the repairs."""
    heads = sum(layer["sinks"] for layer in found["layers"])
    repairs = [repair for layer in found["layers"] for repair in layer["repairs"]]
    kept = sum(repair["accepted"] for repair in repairs)
    text = f"{f'{heads:,}' if heads else 'none'} of their query heads ha{'s' if heads < 2 else 've'} an attention sink"
    return f"{text}, {kept} of {len(repairs)} output projections are refitted" if repairs else text


def losses(found: Mapping[str, Any]) -> str:
    """What the loss rises by: when the layers were chosen, and as written."""
    tokens = f"on {found['measured_tokens']:,} tokens that nothing was fitted on"
    text = f"nats per token before any training, {tokens}: {rise(found['rise'])}"
    choice = found["choice"]
    return (
        text if choice is None else f"{text} (when the layers were chosen, before any repair: {rise(choice['rise'])})"
    )


def rise(found: Mapping[str, float]) -> str:
    """The parts of a `Rise` that were measured."""
    return ", ".join(f"{PARTS[part]} {found[part]:+.3f}" for part in measured(found))


def measured(found: Mapping[str, float | None]) -> list[str]:
    """Parts of a `Rise` that are there."""
    return [part for part in PARTS if found.get(part) is not None]
