"""Freed memory, given back to the system between layers, and on the way through a checkpoint."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """glibc keeps freed matrices of up to 32 MB, and what lies unused between those in use grows with every layer.

    Nothing on systems without its malloc_trim.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
