"""The parts of the windows benchmark: rows of its table, and how the checkpoints that they measure are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FAR = "@32k"
"""What the name of a part at 32,768 positions ends with."""


@dataclass(frozen=True)
class Checkpoint:
    """How a checkpoint is made: what is done to which other one. full: so many layers keep full attention, those that
    need it most by what was measured for RANKED: measured once, not for every row."""

    start: str
    verb: Literal["window", "convert", "recover"]
    options: Mapping[str, Any]
    full: int | None = None


RANKED = "windows"
CHECKPOINTS: Mapping[str, Checkpoint] = {
    "windows": Checkpoint("original", "window", {"size": 1024, "full_layers": 6}),
    "windows-trained": Checkpoint("windows", "recover", {}),
    "windows-2048": Checkpoint("original", "window", {"size": 2048}, 6),
    "windows-2048-trained": Checkpoint("windows-2048", "recover", {}),
    "windows-512": Checkpoint("original", "window", {"size": 512}, 6),
    "windows-8": Checkpoint("original", "window", {"size": 512}, 3),
    "windows-8-trained": Checkpoint("windows-8", "recover", {}),
    "heads": Checkpoint("original", "convert", {"kv_heads": 1}),
    "heads-trained": Checkpoint("heads", "recover", {}),
    "heads-windows-8": Checkpoint("heads", "window", {"size": 1024}, 10),
    "heads-windows-12": Checkpoint("heads", "window", {"size": 1024}, 6),
    "heads-windows-12-trained": Checkpoint("heads-windows-12", "recover", {}),
}


@dataclass(frozen=True)
class Row:
    """A row of the table. kind: what makes the cache smaller, a line of the chart. cache: dtype of the KV cache."""

    words: str
    kind: str
    checkpoint: str
    cache: str | None = None


TRAINED = "150,000 tokens of distillation"
ROWS: Mapping[str, Row] = {
    "original": Row("original", "cache dtype", "original"),
    "windows": Row("windows of 1,024 in 24 of 30 layers", "windows", "windows"),
    "windows-trained": Row(f"the same after {TRAINED}", "windows, trained", "windows-trained"),
    "windows-2048": Row("windows of 2,048 in 24 of 30 layers", "windows", "windows-2048"),
    "original-q8_0": Row("cache in q8_0", "cache dtype", "original", "q8_0"),
    "original-q4_0": Row("cache in q4_0", "cache dtype", "original", "q4_0"),
    "original-fp8": Row("cache in fp8_e4m3", "cache dtype", "original", "fp8_e4m3"),
    "heads": Row("1 of 3 KV heads", "heads", "heads"),
    "windows-q8_0": Row("the windows, cache in q8_0", "windows + cache dtype", "windows", "q8_0"),
    "windows-trained-q8_0": Row(
        "the trained windows, cache in q8_0", "windows + cache dtype", "windows-trained", "q8_0"
    ),
    "windows-trained-q4_0": Row(
        "the trained windows, cache in q4_0", "windows + cache dtype", "windows-trained", "q4_0"
    ),
    "windows-512": Row("windows of 512 in 24 of 30 layers", "windows", "windows-512"),
    "windows-8": Row("windows of 512 in 27 of 30 layers", "windows", "windows-8"),
    "heads-windows-8": Row("1 of 3 KV heads, windows of 1,024 in 20 layers", "heads x windows", "heads-windows-8"),
    "heads-windows-12": Row("1 of 3 KV heads, windows of 1,024 in 24 layers", "heads x windows", "heads-windows-12"),
}
FURTHER: Mapping[str, Row] = {
    "heads-trained": Row(f"1 of 3 KV heads after {TRAINED}", "heads", "heads-trained"),
    "windows-2048-trained": Row(
        f"windows of 2,048 in 24 layers after {TRAINED}", "windows, trained", "windows-2048-trained"
    ),
    "windows-8-trained": Row(f"windows of 512 in 27 layers after {TRAINED}", "windows, trained", "windows-8-trained"),
    "heads-windows-12-trained": Row(
        f"1 of 3 KV heads, windows of 1,024 in 24 layers, after {TRAINED}",
        "heads x windows",
        "heads-windows-12-trained",
    ),
}
EVERY = {**ROWS, **FURTHER}
PARTS = (*EVERY, *(f"{name}{FAR}" for name, row in EVERY.items() if row.cache is None))
