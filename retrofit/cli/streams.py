"""Standard streams as a shell may hand them over: closed, on a full disk, at a pipe whose reader has gone, in ASCII.

Work of hours does not end because nobody reads what it says: what a stream does not take is dropped, and reported at
the end. A closed descriptor is not left to the next file that is opened, which C libraries would then write their words
to.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


class _Dropping(io.RawIOBase):
    """A descriptor whose failures are remembered, not raised."""

    def __init__(self, descriptor: int, former: TextIO | None) -> None:
        self._descriptor = descriptor
        self._former = former  # which would close the descriptor when nothing held it any more
        self.failure: OSError | None = None

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(view) and self.failure is None:
            try:
                done += os.write(self._descriptor, view[done:])
            except OSError as error:
                self.failure = error
        return len(view)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def repair() -> None:
    """Make stdin, stdout and stderr usable, whatever they are; to be called before anything else is opened."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)


def silence() -> None:
    """Show nothing of what this process says, one of several; `failing` is heard."""
    sys.stdout = sys.stderr = _stream(None, os.open(os.devnull, os.O_WRONLY))


def failing() -> TextIO:
    """stderr, also of a process that is silent."""
    return _stream(None, 2)


def finish() -> int | None:
    """Flush both streams. The exit code that a failure of stdout calls for, None without one; stderr reports it."""
    failure = None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if stream is sys.stdout and isinstance(raw, _Dropping):
            failure = raw.failure
    if failure is None:
        return None
    if failure.errno == errno.EPIPE:
        return BROKEN_PIPE
    sys.stderr.write(f"the result could not be written: {failure.strerror}\n  where: standard output\n")
    sys.stderr.flush()
    return 2


def _stream(stream: TextIO | None, number: int) -> TextIO:
    """A text stream on the descriptor; characters that its encoding lacks are written as escapes."""
    encoding = (stream.encoding if stream is not None else None) or "utf-8"
    if stream is not None:
        stream.flush()
    buffer = io.BufferedWriter(_Dropping(number, stream))
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)
