"""How many threads torch computes with: all of its own choice, or fewer while other work keeps cores busy.

Threads of a matrix product wait for each other, so one that has to share its core holds up all of them. What a product
rounds depends on how many threads share it; OMP_NUM_THREADS fixes the number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrofit.console import Progress

SET_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MUCH_IDLE = 4  # so many times the threads that are used could be
_LOAD = Path("/proc/loadavg")
_SAMPLES, _EVERY = 5, 0.02  # seconds


@contextmanager
def sharing_cores(progress: Progress | None, processes: int = 1) -> Iterator[None]:
    """In the block torch leaves busy cores to other work, which a note says; nothing is changed where the environment
    names a number of threads. processes: of this command on this machine, which share its cores."""
    import torch

    usual = torch.get_num_threads()
    named = any(os.environ.get(name) for name in SET_BY)
    each = (os.cpu_count() or 1) // processes
    if named and processes > 1 and progress and usual * MUCH_IDLE <= each:  # torchrun sets 1 where nothing is set
        progress.note(
            f"each of {processes} processes computes with {usual} of the {each} cores it could have on the CPU: "
            f"OMP_NUM_THREADS={each} uses them"
        )
    threads = usual if named else free_threads(usual) if processes == 1 else max(1, min(usual, each))
    if threads == usual:
        yield
        return
    if progress and processes == 1:
        progress.note(f"other work is running: {threads} of {usual} threads are used (OMP_NUM_THREADS={usual}: all)")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def free_threads(usual: int) -> int:
    """Cores of this machine less its load, at least one and at most `usual`."""
    return max(1, min(usual, (os.cpu_count() or 1) - round(load())))


def load() -> float:
    """Threads of other work that want a core: the average of the last minute or those of now, whichever are fewer.

    The average still counts work that has ended, a command of ours before this one for example.
    """
    try:
        average = os.getloadavg()[0]
    except OSError:
        return 0.0
    if average < 0.5 or not _LOAD.is_file():
        return average
    seen = []
    for _ in range(_SAMPLES):
        time.sleep(_EVERY)
        running = _LOAD.read_text(encoding="ascii").split()[3].partition("/")[0]
        seen.append(max(0, int(running) - 1))  # without this one
    return min(average, sum(seen) / len(seen))
