"""What a part of the check is given and what it gives: rows of numbers, each with what was predicted where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """device: cuda, or cpu. reduced: everything tiny. work: a folder for checkpoints and runs. model: SmolLM2 as
    `retrofit` takes it, or None for a random model of its shape."""

    device: str
    reduced: bool
    work: Path
    model: str | None

    @property
    def dtype(self) -> str:
        """What models are computed in: bfloat16 on a GPU, float32 on a CPU, where rounding hides nothing."""
        return "bfloat16" if self.device.startswith("cuda") else "float32"


@dataclass(frozen=True)
class Row:
    """One number. predicted: what the plan gave, in the same unit. passed: None where nothing is required of it."""

    what: str
    value: float | str
    unit: str = ""
    predicted: float | None = None
    passed: bool | None = None
    note: str = ""


Part = Callable[[Setting], Iterator[Row]]
