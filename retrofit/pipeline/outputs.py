"""Where a command of one step writes: refused before any work when something stands in the way."""

from __future__ import annotations

from pathlib import Path

from retrofit.checkpoint.place import require_writable
from retrofit.errors import UserError
from retrofit.kv_heads.moments import ORIGIN, saved
from retrofit.recipe.schema import Convert


def work_folder(out: Path) -> Path:
    """Where a command keeps what it goes on from: beside its output, or beside what a link of that name points to."""
    out = out.resolve()
    return out.with_name(f"{out.name}.work")


def require_new(out: Path) -> None:
    """UserError unless `out` can become a new folder."""
    require_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "the output folder exists and is not empty", where=str(out), fix="remove it, or give another --out"
        )


def require_moments(folder: Path, section: Convert, out: Path) -> None:
    """UserError unless the conversion measures moments and `folder` can hold them beside the checkpoint `out`."""
    require_writable(folder)
    place, checkpoint = folder.resolve(), out.resolve()
    for taken in (checkpoint, checkpoint.with_name(f"{checkpoint.name}.work")):
        if place.is_relative_to(taken) or taken.is_relative_to(place):
            raise UserError(
                "moments and checkpoint are folders of their own, neither inside the other",
                where=f"--moments {folder}, --out {out}",
                fix=f"give for example --moments {out}-moments",
            )
    if not section.calibrates:
        raise UserError(
            f"the method `{section.method}` measures no moments", where="--moments", fix="leave out --moments"
        )
    held = {path.name for path in folder.iterdir()} - {ORIGIN} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or len(held) != len(saved(folder))):
        raise UserError(
            "the folder holds something else than moments", where=f"--moments {folder}", fix="give another folder"
        )


def require_file(out: Path) -> None:
    """UserError unless `out` can become a file of token losses."""
    require_writable(out.parent)
    if out.suffix != ".npz":
        raise UserError("token losses are kept in a .npz file", where=f"--out {out}", fix=f"write --out {out}.npz")
