"""How fast this machine multiplies matrices: measured in a fraction of a second for a plan's time estimate."""

from __future__ import annotations

import torch

from retrofit.model.load import multiplies_in_bfloat16
from retrofit.system.device import is_gpu
from retrofit.system.speed import bandwidth, flops, launch_seconds, matrix_size
from retrofit.workflow.estimate.cost import Throughput


def measure(device: str = "cpu", seconds: float = 0.2) -> Throughput:
    """Throughput of square products, 1,024 wide on a CPU and 8,192 on CUDA: the best of those that fit into `seconds`.

    A processor without bfloat16 products takes seconds for one, and nothing here would use it: it is not timed. On a
    GPU its memory and the launch of a small kernel are measured too.
    """
    where = f"measured here on {matrix_size(device)}-wide products on {device}"
    float32 = flops(torch.float32, device, seconds)
    if not multiplies_in_bfloat16(device):
        return Throughput(float32, float32, f"{float32 / 1e9:,.0f} GFLOP/s in float32, {where}")
    bfloat16 = flops(torch.bfloat16, device, seconds)
    how = f"{bfloat16 / 1e9:,.0f} GFLOP/s in bfloat16 and {float32 / 1e9:,.0f} in float32, {where}"
    if not is_gpu(device):
        return Throughput(max(bfloat16, float32), float32, how)
    launch = launch_seconds(device)
    how += f", {launch * 1e6:.3g} us to launch a kernel"
    return Throughput(max(bfloat16, float32), float32, how, bandwidth(device), launch)
