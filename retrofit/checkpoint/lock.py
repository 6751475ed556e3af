"""One owner of a folder or file that is written: an advisory lock on `.<name>.lock` beside it.

The kernel drops the lock when its process dies. What stands under that name and is not such a lock (a link, a folder,
somebody's file) is never opened for writing, emptied or removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.staging import require_writable
from retrofit.errors import UserError
from retrofit.escape import shown

if TYPE_CHECKING:
    from retrofit.console import Progress

WAIT_SECONDS = 0.2
_WORDS = re.compile(rb"retrofit, process (\d{1,10})\n")
_MOST = 64


@contextmanager
def folder_lock(path: str | Path, *, wait: bool = False, progress: Progress | None = None) -> Iterator[None]:
    """Hold `path` for this process, whether it exists yet or not; UserError when another one holds it.

    A symbolic link `path` is followed: the folder has one lock, whatever name it goes by. wait: wait for another
    process instead, for example where both make the same file of a cache.
    """
    path = Path(path).resolve()
    require_writable(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error, path) from None
    lock = path.parent / f".{path.name}.lock"
    announced = False
    while True:
        descriptor = _opened(lock, path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            if not wait:
                raise UserError(
                    f"the {'file' if path.is_file() else 'folder'} is in use by process {owner}",
                    where=shown(path),
                    fix="wait until it has finished, or give another --out",
                ) from None
            if progress and not announced:
                progress.note(f"waiting for process {owner}, which makes {shown(path)}")
            announced = True
            time.sleep(WAIT_SECONDS)
            continue
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"files cannot be locked there ({error.strerror})", where=shown(path.parent), fix="use another disk"
            ) from None
        if _is_file(descriptor, lock):
            break
        os.close(descriptor)
    try:
        _require_ours(descriptor, lock)
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"retrofit, process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        if _is_file(descriptor, lock) and _is_ours(descriptor):
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _opened(lock: Path, path: Path) -> int:
    """The lock file, made if needed; UserError for whatever else has that name. Links are not followed, pipes not
    waited for."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
            raise _not_ours(lock) from None
        if error.errno == errno.ENAMETOOLONG:
            raise UserError("the name is too long", where=shown(path), fix="use a shorter one") from None
        raise _unwritable(error, path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_ours(lock)
    return descriptor


def _require_ours(descriptor: int, lock: Path) -> None:
    if not _is_ours(descriptor):
        raise _not_ours(lock)


def _is_ours(descriptor: int) -> bool:
    """Whether the file is empty or holds what we write, and has this one name."""
    content = os.pread(descriptor, _MOST, 0)
    return os.fstat(descriptor).st_nlink <= 1 and (not content or _WORDS.fullmatch(content) is not None)


def _owner(descriptor: int) -> str:
    found = _WORDS.fullmatch(os.pread(descriptor, _MOST, 0))
    return found[1].decode() if found else "unknown"


def _unwritable(error: OSError, path: Path) -> OSError | UserError:
    """The error to raise where nothing can be made beside `path`; a full disk is reported by the caller."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE):
        return error
    return UserError(f"cannot write there: {error.strerror}", where=shown(path), fix="choose another folder")


def _not_ours(lock: Path) -> UserError:
    return UserError(
        "a lock file of this name is needed for the time of writing, and what stands there is not one",
        where=shown(lock),
        fix="move or remove it, or give another output",
    )


def _is_file(descriptor: int, path: Path) -> bool:
    """False when the former owner removed the file between our open and our lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
