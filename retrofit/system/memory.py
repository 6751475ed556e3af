"""Memory: what this machine has, what a process held at most, and what a piece of work holds beyond that.

The journal counts the peak of a whole step from the operating system and would lose it if it were set back in between:
so `Watch` looks at the resident memory many times a second instead, or asks the device's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_EVERY = 0.002  # seconds
_STATM = Path("/proc/self/statm")
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory(device: str) -> int | None:
    """Bytes of memory and swap that this process may have, of a GPU its own; None where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.startswith("mps"):
        import torch

        return int(torch.mps.recommended_max_memory())
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = [line.split() for line in info.read_text(encoding="ascii").splitlines()]
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdigit()}
    total = sizes.get("MemTotal:", 0) + sizes.get("SwapTotal:", 0)
    limits = [
        int(text) for path in _LIMITS if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdigit()
    ]
    return min([total, *limits]) if total else None


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def give_back() -> None:
    """Hand what earlier work freed to the system, so that it is not counted as the next work's."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others have no such call
        if trim is not None:
            trim(0)


def reset_peak() -> None:
    """Start counting anew, where the system can (Linux); elsewhere the peak is that of the whole process so far.

    What earlier work freed is given back to the system first, so that it is not counted as this work's.
    """
    give_back()
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5", "utf-8")
        except PermissionError:
            return


def peak_bytes() -> int:
    """Most resident memory since `reset_peak`, in bytes."""
    if _STATUS.exists():
        for line in _STATUS.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif _STATM.exists():
            self._before = _resident()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            import torch

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
