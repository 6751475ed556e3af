"""Moments of windows on disk: a file a layer, which appears whole or not at all, and beside them whose they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retrofit.errors import UserError
from retrofit.windows.moments import TENSORS, WindowMoments

_FILE = re.compile(r"windows-(\d{3,})\.safetensors")


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one layer. text: of all windows that were asked for, on text to fit on. answers: of one window, on the
    second copies of passages."""

    text: WindowMoments
    answers: WindowMoments


def save(folder: str | Path, index: int, moments: LayerMoments) -> Path:
    """Write layer `index`'s moments to `windows-007.safetensors` (for 7) in `folder`, in fp32; returns the file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"text": moments.text, "answers": moments.answers}
    facts = {part: {"windows": own.windows, "tokens": own.tokens} for part, own in parts.items()}
    tensors = {f"{part}.{name}": getattr(own, name).float() for part, own in parts.items() for name in TENSORS}
    path = layer_file(folder, index)
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"moments": json.dumps(facts)})
    partial.replace(path)
    return path


def load(folder: str | Path, index: int) -> LayerMoments:
    """The moments that `save` wrote, in float64. Raises UserError when there are none or the file is broken."""
    path = layer_file(Path(folder), index)
    if not path.is_file():
        raise UserError(f"there are no moments of windows of layer {index}", where=str(path), fix="measure them again")
    try:
        with safe_open(path, "pt") as file:
            facts: Mapping[str, Mapping[str, object]] = json.loads((file.metadata() or {})["moments"])
            text, answers = (
                WindowMoments(
                    windows=tuple(facts[part]["windows"]),  # type: ignore[arg-type]
                    tokens=int(facts[part]["tokens"]),  # type: ignore[call-overload]
                    **{name: file.get_tensor(f"{part}.{name}").double() for name in TENSORS},
                )
                for part in ("text", "answers")
            )
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"the moments of windows of layer {index} cannot be read: {error}",
            where=str(path),
            fix="remove the file, run again",
        ) from error
    return LayerMoments(text, answers)


def saved(folder: str | Path) -> tuple[int, ...]:
    """Layers whose moments `folder` holds, in order."""
    folder = Path(folder)
    found = [_FILE.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return tuple(sorted(int(match[1]) for match in found if match))


def layer_file(folder: Path, index: int) -> Path:
    """Where the moments of a layer lie."""
    return folder / f"windows-{index:03d}.safetensors"
