"""Raw bytes of files: written whole, copied inside the kernel where that is possible, moved, sent to the disk early."""

from __future__ import annotations

import ctypes
import errno
import os
from io import FileIO

from retrofit.errors import UserError

CHUNK_BYTES = 8 << 20


def write_back(file: FileIO, offset: int, nbytes: int) -> None:
    """Start writing a range of a file to disk and return at once; nothing where the system has no such call."""
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if start is not None:
        start(file.fileno(), ctypes.c_int64(offset), ctypes.c_int64(nbytes), 2)  # SYNC_FILE_RANGE_WRITE


def write_all(file: FileIO, view: memoryview) -> None:
    """A raw write stops at 2 GiB and at signals; go on until all is written."""
    while view:
        view = view[file.write(view) :]


def copy_bytes(source: FileIO, offset: int, target: FileIO, nbytes: int) -> None:
    """Copy to the target's position inside the kernel where that is possible, else through a small buffer."""
    if hasattr(os, "copy_file_range"):
        try:
            while nbytes:
                copied = os.copy_file_range(source.fileno(), target.fileno(), nbytes, offset_src=offset)
                if not copied:
                    break
                offset, nbytes = offset + copied, nbytes - copied
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
    buffer = memoryview(bytearray(min(CHUNK_BYTES, nbytes)))
    source.seek(offset)
    while nbytes:
        count = source.readinto(buffer[: min(CHUNK_BYTES, nbytes)])
        if not count:
            raise UserError("the file became shorter while it was read", where=str(source.name))
        write_all(target, buffer[:count])
        nbytes -= count


def shift(file: FileIO, start: int, nbytes: int, by: int) -> None:
    """Move `nbytes` at `start` towards the end by `by` bytes, last chunk first."""
    done = nbytes
    while done:
        count = min(CHUNK_BYTES, done)
        done -= count
        file.seek(start + done)
        chunk = b""
        while len(chunk) < count:
            chunk += file.read(count - len(chunk)) or b""
        file.seek(start + done + by)
        write_all(file, memoryview(chunk))
