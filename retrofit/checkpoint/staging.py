"""Where a result goes: permission, room, one owner, and a rename when everything is on disk.

`staged` gives a `<name>.partial` folder and renames it when its block has ended well, so that a folder with its final
name is always whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.files import require_links


def existing_ancestor(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def require_writable(path: str | Path) -> None:
    """UserError unless `path` can be created or written to."""
    path = Path(path)
    require_links(path, where=shown(path))
    place = existing_ancestor(path)
    if not place.is_dir():
        raise UserError(
            f"cannot write there: {place} is a file, not a folder", where=str(path), fix="choose another folder"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"no permission to write into {place}",
            where=str(path),
            fix=f"choose another folder, or make it writable: chmod u+w {shell_word(place)}",
        )


def free_space(path: str | Path) -> int:
    """Free bytes of the disk that holds `path`, or will hold it."""
    return shutil.disk_usage(existing_ancestor(Path(path))).free


def require_free_space(path: str | Path, nbytes: int) -> None:
    """UserError when the disk that holds `path` has less than `nbytes` free."""
    free = free_space(path)
    if free < nbytes:
        raise UserError(
            f"not enough disk space: {_size(nbytes)} needed, {_size(free)} free",
            where=str(path),
            fix=f"free {_size(nbytes - free)} there, or write to another disk",
        )


def put_file(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file, whole or not at all. Raises UserError where one has come there meanwhile, unless it may go."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        partial.chmod(0o666 & ~_umask())
        name_file(partial, path, overwrite=overwrite)
    finally:
        partial.unlink(missing_ok=True)


def name_file(partial: Path, final: Path, *, overwrite: bool = False) -> None:
    """Give a finished file its name in one step. Raises UserError where something has it, unless that may go."""
    if overwrite:
        partial.replace(final)
        return
    try:
        os.link(partial, final)
    except FileExistsError:
        raise UserError("the file exists already", where=shown(final), fix="give another name") from None
    except OSError:  # no hard links there: the name is taken first, which only one process can
        try:
            final.open("xb").close()
        except FileExistsError:
            raise UserError("the file exists already", where=shown(final), fix="give another name") from None
        partial.replace(final)
        return
    partial.unlink()


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


@contextmanager
def staged(
    final: str | Path,
    *,
    overwrite: bool = False,
    keep: Path | None = None,
    before_replacing: Callable[[], object] | None = None,
) -> Iterator[Path]:
    """Yield an empty `<final>.partial` folder and rename it to `final` when the block ends without an exception.

    Everything is flushed to disk before the rename. On an exception the partial folder is removed; after a kill it
    stays and the next call empties it: a mark beside it says that it is ours. keep: the folder to stage in instead, on
    the same disk, which is not emptied: an interrupted call can be resumed from what it left there; it is removed when
    nothing is in it. before_replacing: called right before what is at `final` goes; raises where it may not. A symbolic
    link `final` stays, and the result is what it points to.

    Raises UserError when `final` holds something and `overwrite` is False (also when it was filled inside the block),
    when the place cannot be written or holds a folder of a name that is needed and not ours, and when `keep` is on
    another disk.
    """
    final = Path(final).resolve()
    partial = final.with_name(final.name + ".partial") if keep is None else keep.resolve()
    replaced = final.with_name(final.name + ".replaced")
    require_writable(final)
    if _disk(partial) != _disk(final.parent):
        raise UserError(
            "the work folder and the output folder are on different disks",
            where=f"{partial}, {final}",
            fix=f"name the output folder by its own path: {final}",
        )
    for leftover in (replaced,) if keep else (partial, replaced):
        _require_ours(leftover)
    if replaced.exists() and not final.exists():  # killed between the two renames below
        replaced.rename(final)
        _mark(replaced).unlink(missing_ok=True)  # an empty one has none
    if not overwrite and _holds_something(final):
        raise _not_empty(final)
    for leftover in (replaced,) if keep else (partial, replaced):
        _remove(leftover)
    partial.mkdir(parents=True, exist_ok=keep is not None)
    if keep is None:
        _mark(partial).write_text(_inode(partial), "utf-8")
    try:
        yield partial
        _sync(partial)
        if overwrite and final.exists():
            if before_replacing is not None:
                before_replacing()
            _mark(replaced).write_text(_inode(final), "utf-8")
            final.rename(replaced)
        if _holds_something(final):
            raise _not_empty(final)
        partial.replace(final)  # an empty folder gives way
        _sync_folder(final.parent)
    finally:
        if keep is None:
            _remove(partial)
        elif partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()
        if final.exists():
            _remove(replaced)


@contextmanager
def beside(path: Path, name: str) -> Iterator[Path]:
    """Yield the empty folder `<path>.<name>.partial`, for what is needed for a while on the same disk, and remove it.

    After a kill it stays and the next call empties it: a mark beside it says that it is ours. The caller has `path` for
    itself. Raises UserError for a folder of that name that is somebody else's.
    """
    place = path.resolve()
    place = place.with_name(f"{place.name}.{name}.partial")
    _require_ours(place)
    _remove(place)
    place.mkdir()
    _mark(place).write_text(_inode(place), "utf-8")
    try:
        yield place
    finally:
        _remove(place)


def _holds_something(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _not_empty(final: Path) -> UserError:
    return UserError(
        "the output folder exists and is not empty", where=str(final), fix="remove it, or give another folder"
    )


def _require_ours(folder: Path) -> None:
    """UserError unless the folder is absent, empty, or was left by a staged write that was killed."""
    mark = _mark(folder)
    if _holds_something(folder) and not (mark.is_file() and mark.read_text("utf-8") == _inode(folder)):
        raise UserError(
            "a folder of this name is needed for the time of writing, and this one was not made for that",
            where=str(folder),
            fix="rename or remove it, or give another output folder",
        )


def _mark(folder: Path) -> Path:
    """Beside a folder that a staged write may remove: one it made itself, or was told to replace. It holds the folder's
    inode, so that another one of the same name is not taken for it."""
    return folder.with_name(f".{folder.name}.staging")


def _inode(folder: Path) -> str:
    return str(folder.stat().st_ino)


def _remove(folder: Path) -> None:
    """Remove a folder of ours, and its mark last."""
    if folder.exists():
        shutil.rmtree(folder)
    _mark(folder).unlink(missing_ok=True)


def _disk(path: Path) -> int:
    return existing_ancestor(path).stat().st_dev


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
