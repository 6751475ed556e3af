"""Peak memory of a piece of work, from the operating system."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from retrofit.evaluate.memory import give_back

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


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
