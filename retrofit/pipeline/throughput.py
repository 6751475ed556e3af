"""How fast this machine multiplies matrices: measured in a fraction of a second for a plan's time estimate."""

from __future__ import annotations

import time

import torch

from retrofit.pipeline.plan import Throughput

SIZE = 1024


def measure(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seconds: float = 0.3) -> Throughput:
    """Throughput of a 1024 x 1024 x 1024 product in `dtype`, the best of the calls that fit into `seconds`."""
    a, b = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    a @ b
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    flops = 2 * SIZE**3 / best
    name = str(dtype).removeprefix("torch.")
    how = f"{flops / 1e9:,.0f} GFLOP/s, measured here on a {SIZE}-wide {name} product on {device}"
    return Throughput(flops, how)
