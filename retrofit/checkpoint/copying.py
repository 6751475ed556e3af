"""A file under another name: a copy of its own, which shares blocks where the file system can, or a hard link if asked.

A program that writes in place into one name of a hard-linked file changes the other: what a person gets is a file of
its own unless he wants otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from io import FileIO
from pathlib import Path

from retrofit.checkpoint.raw import copy_bytes
from retrofit.checkpoint.staging import require_free_space

FICLONE = 0x40049409  # of linux/fs.h: the target's blocks become the source's, until one of the two is written
_CANNOT = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)


def copy_file(source: Path, target: Path, *, link: bool = False) -> None:
    """Give the file `source` (links are followed) the further name `target`, which must not exist.

    link: a hard link where the disk allows it. Otherwise the bytes are shared by reflink or copied inside the kernel.
    Raises UserError when a copy has no room, FileExistsError when there is something at `target`.
    """
    source = source.resolve()
    if link:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
    with FileIO(source) as read, FileIO(target, "x") as written:
        try:
            if not _cloned(read, written):
                nbytes = os.fstat(read.fileno()).st_size
                require_free_space(target.parent, nbytes)
                copy_bytes(read, 0, written, nbytes)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _cloned(source: FileIO, target: FileIO) -> bool:
    """Whether the file system let both files share their blocks."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True
