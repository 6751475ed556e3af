"""Failures of the machine as messages: a full disk, a limit, a file system that cannot be written, no memory.

Libraries report them in words of their own (safetensors, torch and NumPy drop the error number); `machine_error` knows
these. What is no failure of the machine stays the error it is.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.format import nbytes

LITTLE = 16 << 20
"""A disk with less than this free is the one that is full, where an error does not say which."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PLAIN = {
    errno.EACCES: ("no permission", "make it accessible, or choose another place"),
    errno.EPERM: ("this is not permitted", "make it accessible, or choose another place"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.EIO: ("the disk reports an error", "check the disk, or use another one"),
    errno.ESTALE: ("the network file system lost the file", "check the mount, then type the same command again"),
    errno.ENAMETOOLONG: ("a name is too long", "use shorter names"),
    errno.ELOOP: ("a path is a loop of symbolic links", "check the path"),
    errno.EMFILE: ("too many open files for this process", "raise the limit: ulimit -n 1024"),
    errno.ENFILE: ("too many open files on this machine", "close other programs"),
    errno.ENOMEM: ("not enough memory", "use smaller batches or lengths, or a machine with more memory"),
}
_WORDS = (  # of an error that carries no number
    (re.compile(r"os error (\d+)"), None),  # safetensors
    (re.compile(r"\d+ requested and \d+ written"), errno.ENOSPC),  # NumPy
    (re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos"), errno.ENOSPC),
    (re.compile(r"can't allocate memory|not enough memory|CUDA out of memory"), errno.ENOMEM),
)


@contextmanager
def writing(*places: str | Path | None, needed: int | None = None) -> Iterator[None]:
    """Failures of the machine in the block become a UserError.

    places: where it writes, the output first; one of them is named where the error names none. needed: bytes that it
    writes there in all.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        found = machine_error(error, *places, needed=needed)
        if found is None:
            raise
        raise found from error


def machine_error(error: BaseException, *places: str | Path | None, needed: int | None = None) -> UserError | None:
    """What to tell a person of a failure of the machine; None where it is no such failure."""
    number = _number(error)
    name = getattr(error, "filename", None)
    given = [Path(place) for place in places if place is not None]
    where = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
    if number in _FULL:
        return _full(where or _fullest(given), given, needed, quota=number == errno.EDQUOT)
    if number == errno.EFBIG:
        return _too_large(where or next(iter(given), None))
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return UserError(
            "no folder for temporary files can be written",
            where="TMPDIR",
            fix="name one that can: export TMPDIR=/path/to/folder",
        )
    if number in _PLAIN:
        what, fix = _PLAIN[number]
        place = where or next(iter(given), None)
        return UserError(what, where=None if place is None else shown(place), fix=fix)
    return None


def _number(error: BaseException) -> int | None:
    """The system's number of the error, also where a library gave it as words."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    for words, number in _WORDS:
        if match := words.search(str(error)):
            if number is None:
                return int(match[1])
            # NumPy and torch do not say whether the disk was full or a limit reached.
            return errno.EFBIG if number == errno.ENOSPC and _limit() is not None else number
    return None


def _full(where: Path | None, places: Sequence[Path], needed: int | None, *, quota: bool) -> UserError:
    free = "" if where is None else f", {nbytes(_free(where))} free"
    wanted = "" if needed is None else f"; this needs about {nbytes(needed)} in all"
    kept = _removable(where, places)
    return UserError(
        f"the {'quota' if quota else 'disk'} is full{free}{wanted}",
        where=None if where is None else shown(where),
        fix="free space there, or write to another disk" + (f". {kept}" if kept else ""),
    )


def _too_large(where: Path | None) -> UserError:
    limit = _limit()
    return UserError(
        "a file would be larger than this process may write" + ("" if limit is None else f" ({nbytes(limit)})"),
        where=None if where is None else shown(where),
        fix="raise the limit: ulimit -f unlimited",
    )


def _limit() -> int | None:
    """The most bytes that this process may write into a file; None without such a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft


def _fullest(places: Sequence[Path]) -> Path | None:
    """The place whose disk has least room, among them the folder for temporary files."""
    asked = [place for place in (*places, _temporary()) if place is not None]
    first = next(iter(asked), None)
    return next((place for place in asked if _free(place) < LITTLE), first)


def _temporary() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def _free(path: Path) -> int:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _removable(where: Path | None, places: Sequence[Path]) -> str:
    """What this program keeps beside its outputs, which a person may give up."""
    kept = [work for place in places if (work := place.with_name(f"{place.name}.work")).is_dir()]
    if not kept:
        return ""
    size = sum(file.stat().st_size for file in kept[0].rglob("*") if file.is_file())
    return f"{shown(kept[0])} ({nbytes(size)}) is what the same command resumes from; remove it to start anew"
