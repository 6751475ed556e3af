"""What a command stands on and in: its process, a working directory that exists, permission on its own files, signals.

Everything here is asked before anything else happens.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from retrofit.errors import UserError

# How launchers that this program does not read tell a process how many there are: Open MPI, MPICH and Intel MPI,
# MVAPICH2.
WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class Stopped(KeyboardInterrupt):
    """The process was asked to end (SIGTERM, SIGHUP); it unwinds like one that was interrupted at a terminal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def require_usable() -> None:
    """UserError where a command cannot work: one of several processes that do not know of each other, in a removed
    folder, or without rights on what it writes itself."""
    for name in WORLD_SIZES if "WORLD_SIZE" not in os.environ else ():
        size = os.environ.get(name, "").strip()
        if size.isascii() and size.isdigit() and int(size[:9]) > 1:
            raise UserError(
                f"this is one of {int(size[:9])} processes, and they were not started by torchrun or accelerate launch",
                where=f"{name} in the environment",
                fix=f"torchrun --nproc-per-node={int(size[:9])} -m retrofit ..., or start `retrofit` by itself",
            )
    if sys.flags.optimize > 1:
        raise UserError(
            "Python runs without docstrings, from which transformers makes parts of its classes",
            where="python -OO, or PYTHONOPTIMIZE in the environment",
            fix="unset PYTHONOPTIMIZE",
        )
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError(
            "the working directory does not exist any more", where="the current folder", fix="cd to one that does"
        ) from None
    mask = os.umask(0o077)
    os.umask(mask)
    if mask & 0o700:
        raise UserError(
            f"the umask {mask:03o} takes this program's own permission on the files that it writes",
            where="umask",
            fix="umask 022",
        )


@contextmanager
def stopping() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise `Stopped`, so that what is half-written goes; ignored ones stay ignored."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not wait
        raise Stopped(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, stop)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
