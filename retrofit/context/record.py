"""What a checkpoint folder's retrofit.json says of earlier extensions, where config.json does not say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrofit.checkpoint.provenance import FILE, read_provenance


def held_scale(folder: Path) -> float:
    """What the recorded extensions have multiplied the queries with, 1 where none is recorded.

    A further extension computes its attention factor anew, so this has to be divided out first.
    """
    return math.prod(result.get("query_scale", 1.0) for result in _extensions(folder))


def first_original(folder: Path) -> int | None:
    """The window in tokens before the first recorded extension; None where none is recorded."""
    return next((int(result["original"]) for result in _extensions(folder)), None)


def _extensions(folder: Path) -> list[Mapping[str, Any]]:
    """The results of the steps that made the window longer, the first one first."""
    steps = read_provenance(folder).get("steps", ()) if (folder / FILE).is_file() else ()
    return [step["result"] for step in steps if step["step"] == "extend"]
