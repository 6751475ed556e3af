"""The most memory that a piece of work holds beyond what was held before it, without touching the process's own count.

The journal counts the peak of a whole step from the operating system and would lose it if it were set back in between:
so the resident memory is looked at many times a second instead, or the device's allocator is asked.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from pathlib import Path

import torch

_EVERY = 0.002  # seconds
_STATM = Path("/proc/self/statm")


def give_back() -> None:
    """Hand what earlier work freed to the system, so that it is not counted as the next work's."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others have no such call
        if trim is not None:
            trim(0)


class Watch:
    """`with Watch(device) as watch: ...`; `watch.most_bytes` afterwards, 0 where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.most_bytes = 0
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = 0

    def __enter__(self) -> Watch:
        give_back()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif _STATM.exists():
            self._before = _resident()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.most_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._thread.is_alive():
            self._done.set()
            self._thread.join()
            self.most_bytes = max(self.most_bytes, _resident() - self._before)

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            self.most_bytes = max(self.most_bytes, _resident() - self._before)


def _resident() -> int:
    return int(_STATM.read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
