"""Converted checkpoints in the cache: made once, and used again only while every byte is the one that was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.provenance import sha256
from retrofit.checkpoint.staging import require_writable, staged
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import local_path, read_json

if TYPE_CHECKING:
    from retrofit.console import Progress

MANIFEST = ".digests.json"
"""Beside a cached folder's files: the SHA-256 of each."""


def cache_dir() -> Path:
    """RETROFIT_CACHE, else `retrofit` in the user's cache folder."""
    if explicit := os.environ.get("RETROFIT_CACHE"):
        return local_path(explicit, where="RETROFIT_CACHE")
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", where="HOME, or XDG_CACHE_HOME") / "retrofit"


def sound(folder: Path, progress: Progress | None = None) -> bool:
    """Whether a cached folder is there and holds what was written into it, and nothing else.

    Where one does not, a note to `progress` says so.
    """
    if not os.path.lexists(folder):
        return False
    wrong = _difference(folder)
    if wrong is not None and progress:
        progress.note(f"the cached copy in {shown(folder)} is not what was written there ({wrong}): it is made again")
    return wrong is None


def cached(
    final: Path,
    make: Callable[[Path], None],
    *,
    unfinished: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The sound folder `final` of the cache; `make` writes it where there is none.

    make: writes into the empty folder that it is given. unfinished: the folder to write in instead, which keeps what
    an interrupted call wrote. Another process that writes the same is waited for. Raises UserError when the cache
    cannot be written.
    """
    if final.exists() and not final.is_dir():
        raise UserError("a file is where a folder of the cache belongs", where=shown(final), fix="rename or remove it")
    require_writable(final)
    with folder_lock(final, wait=True, progress=progress), writing(final):
        if sound(final):  # made by another process meanwhile
            return final
        with staged(final, overwrite=True, keep=unfinished) as partial:
            make(partial)
            digests = {name: sha256(partial / name) for name in _files(partial)}
            (partial / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    return final


def _difference(folder: Path) -> str | None:
    """What is not as it was written, in a few words."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        written = read_json(folder / MANIFEST)
        found = _files(folder)
    except UserError:
        return "its digests cannot be read"
    for name in sorted(written.keys() | set(found)):
        if name not in found:
            return f"{shown(name, 60)} is missing"
        if name not in written:
            return f"{shown(name, 60)} was added"
        if (folder / name).is_symlink() or not (folder / name).is_file() or sha256(folder / name) != written[name]:
            return f"{shown(name, 60)} was changed"
    return None


def _files(folder: Path) -> list[str]:
    """Names of everything in a folder but other folders and the digests, relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST]
