"""What a checkpoint folder's retrofit.json says of earlier extensions, where config.json does not say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrofit.checkpoint.config import is_number, is_whole
from retrofit.checkpoint.provenance import FILE, read_provenance
from retrofit.errors import UserError
from retrofit.escape import shown


def require_record(folder: Path) -> None:
    """Raises UserError where retrofit.json holds something else than this program writes about extensions."""
    held_scale(folder)
    first_original(folder)


def held_scale(folder: Path) -> float:
    """What the recorded extensions have multiplied the queries with, 1 where none is recorded.

    A further extension computes its attention factor anew, so this has to be divided out first.
    """
    scales = [result.get("query_scale", 1.0) for result in _extensions(folder)]
    if not all(is_number(scale) and scale > 0 for scale in scales):
        raise _broken(folder, "query_scale")
    return math.prod(scales)


def first_original(folder: Path) -> int | None:
    """The window in tokens before the first recorded extension; None where none is recorded."""
    for result in _extensions(folder):
        if not is_whole(result.get("original")) or result["original"] < 1:
            raise _broken(folder, "original")
        return int(result["original"])
    return None


def _extensions(folder: Path) -> list[Mapping[str, Any]]:
    """The results of the steps that made the window longer, the first one first."""
    steps = (read_provenance(folder).get("steps") or ()) if (folder / FILE).is_file() else ()
    return [step.get("result") or {} for step in steps if step["step"] == "extend"]


def _broken(folder: Path, name: str) -> UserError:
    return UserError(
        f"retrofit.json records an extension without a number as its `{name}`",
        where=shown(folder / FILE),
        fix="download the folder again, or remove retrofit.json",
    )
