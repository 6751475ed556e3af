"""How fast this machine is: products of matrices, and reading memory. Fractions of a second each."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LAUNCHES = 500  # of a small kernel, timed together
COPY_BYTES = 256 << 20  # far more than any cache holds


def matrix_size(device: str) -> int:
    """Width of the matrices that are multiplied: small ones measure how fast a GPU is given work, not how fast it
    works."""
    return {"cuda": 8192, "mps": 4096}.get(device.partition(":")[0], 1024)


def flops(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.2) -> float:
    """Floating-point operations per second of a product in `dtype`, of matrices large enough to fill the device."""
    size = matrix_size(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device, seconds)


def bandwidth(device: str = "cpu", seconds: float = 0.3) -> float:
    """Bytes per second of a large copy, read and written bytes both counted."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * COPY_BYTES / _best(lambda: target.copy_(source), device, seconds)


def launch_seconds(device: str, seconds: float = 0.2) -> float:
    """Seconds that launching one small kernel takes, the work of the kernel itself being next to nothing."""
    one = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return _best(launch, device, seconds) / LAUNCHES


def _best(work: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, one at least, after one that is not counted."""
    work()
    synchronize(device)
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()
