"""Run one function in a forked process with limits on its time and memory: for what a foreign file makes of a library.

What the function gives comes back as bytes; what it raises as text. Neither can leave a mark in this process.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

WAIT_SECONDS = 120
"""Until the answer is there, on a machine that does much else."""
_DONE, _ERROR = b"t", b"e"


class LimitedError(Exception):
    """The function raised, and this says what; or, without text, it was ended by a limit."""


def limited(work: Callable[[], bytes], *, seconds: int, memory: int, most: int) -> bytes:
    """What `work()` returns, computed in a copy of this process.

    seconds: of processor time. memory: bytes beyond what this process has. most: bytes of the answer, of which one more
    comes back where there are more. Raises LimitedError.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _child(work, read, write, seconds, memory, most)
    os.close(write)
    try:
        answer = _answer(read)
    finally:
        os.close(read)
        _end(child)
    if answer is None:
        raise LimitedError
    if answer[:1] == _ERROR:
        raise LimitedError(answer[1:].decode("utf-8", "replace"))
    return answer[1:]


def _child(work: Callable[[], bytes], read: int, write: int, seconds: int, memory: int, most: int) -> None:
    """Compute and write the answer; never returns. What `work` raises is an answer too."""
    answer = _ERROR + b"it ended without an answer"
    try:
        os.close(read)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = Path("/proc/self/statm")
        if size.exists():
            limit = int(size.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        answer = _DONE + work()
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            cause = "it needs too much memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
            answer = _ERROR + cause.encode("utf-8", "replace")
        rest = memoryview(answer[: most + 2])
        while rest:
            rest = rest[os.write(write, rest) :]
        os._exit(0)


def _answer(read: int) -> bytes | None:
    """What the child wrote; None when it was ended by a limit, or does not answer."""
    until = time.monotonic() + WAIT_SECONDS
    parts: list[bytes] = []
    while select.select([read], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(read, 1 << 16)
        if not part:
            return b"".join(parts) or None
        parts.append(part)
    return None


def _end(child: int) -> None:
    ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
