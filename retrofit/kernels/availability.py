"""Which attention kernels this machine can run, what of them is installed, and what to type for the others.

Flash attention comes from its own packages or, built already, from the hub through the package `kernels`. Only the
repositories named here are loaded: what they hold is native code, written by others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from retrofit.install import install_command

HUB_KERNELS = {
    "kernels-community/flash-attn2": 8,
    "kernels-community/flash-attn3": 8,
    "kernels-community/vllm-flash-attn3": 8,
    "kernels-community/flash-attn4": 9,
}
"""Repositories of kernels, and the compute capability (major) that each needs."""

CAPTURE_WARM_UP = 3  # steps before a capture: libraries choose their kernels and allocate what they keep
COMPILES = "PyTorch compiles it first, half a minute of a core for each of: a first chunk, later chunks, single tokens"
"""What `flex_attention` does on a CPU, for people who wait for it."""


@dataclass(frozen=True)
class FlashPackage:
    """A release of flash attention. package: on PyPI or built from source. hub: the repository that transformers loads
    instead. capability: the compute capability (major) that it needs."""

    package: str
    install: str
    hub: str
    capability: int


FLASH = {
    "flash_attention_2": FlashPackage(
        "flash-attn", install_command("flash-attn", "--no-build-isolation"), "kernels-community/flash-attn2", 8
    ),
    "flash_attention_3": FlashPackage(
        "flash-attn-3", "build `hopper/` of Dao-AILab/flash-attention", "kernels-community/vllm-flash-attn3", 8
    ),
    "flash_attention_4": FlashPackage(
        "flash-attn-4", install_command("flash-attn-4"), "kernels-community/flash-attn4", 9
    ),
}


@dataclass(frozen=True)
class Machine:
    """What kernels need. capability: of the first GPU, None where there is no CUDA. compiler: of C++. versions: of the
    installed packages of FLASH and of `kernels`. offline: the hub must not be asked. cached: repositories of kernels
    that the cache of the hub holds."""

    capability: tuple[int, int] | None = None
    mps: bool = False
    compiler: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    offline: bool = False
    cached: frozenset[str] = frozenset()


@dataclass(frozen=True)
class KernelStatus:
    """Whether this machine can run a kernel; `install` is what to type when something is missing. implementation: what
    transformers is asked for, where that is not `name`."""

    name: str
    available: bool
    reason: str
    install: str | None = None
    implementation: str | None = None


def machine_here() -> Machine:
    """What this machine has."""
    import torch
    from huggingface_hub import constants

    cuda = torch.cuda.is_available()
    cache = Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE)
    folders = [path.name for path in cache.iterdir()] if cache.is_dir() else []
    return Machine(
        capability=torch.cuda.get_device_capability() if cuda else None,
        mps=torch.backends.mps.is_available(),
        compiler=bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
        versions=_versions([*(flash.package for flash in FLASH.values()), "kernels"]),
        offline=bool(constants.HF_HUB_OFFLINE),
        cached=frozenset(
            name for name in HUB_KERNELS if any(folder.endswith(name.replace("/", "--")) for folder in folders)
        ),
    )


def available(machine: Machine | None = None) -> list[KernelStatus]:
    """Every kernel on this machine, for `retrofit doctor`."""
    machine = machine or machine_here()
    tiles = "ours: on a CPU over PyTorch's flash op, on CUDA over the fastest that is right there (half precision)"
    return [
        KernelStatus("eager", True, "plain PyTorch, tokens x tokens memory"),
        KernelStatus("sdpa", True, "PyTorch's scaled_dot_product_attention"),
        *(_flash(name, machine) for name in FLASH),
        *(_hub_kernel(name, machine) for name in HUB_KERNELS),
        _flex(machine),
        KernelStatus("blockwise", True, tiles + ("; MPS has none" if machine.mps else "")),
        KernelStatus("products", True, "ours, for training on a CPU in bfloat16; `auto` takes it, for nothing else"),
    ]


def _flash(name: str, machine: Machine) -> KernelStatus:
    """From its package, else from the hub."""
    flash = FLASH[name]
    version = machine.versions.get(flash.package)
    if version is None and "kernels" in machine.versions:
        status = _hub_kernel(flash.hub, machine)
        reason = f"{flash.package} is not installed; instead {flash.hub}: {status.reason}"
        return KernelStatus(name, status.available, reason, flash.install, flash.hub if status.available else None)
    missing = [] if version else [f"the package {flash.package} is not installed"]
    objection = _card(machine, flash.capability)
    missing += [objection] if objection else []
    if missing:
        install = None if version else f"{flash.install}, or {install_command('kernels')}"
        where = "" if machine.capability else "on a machine with CUDA: "
        return KernelStatus(name, False, ", and ".join(missing), install and where + install)
    return KernelStatus(name, True, f"{flash.package} {version}")


def _hub_kernel(name: str, machine: Machine) -> KernelStatus:
    version = machine.versions.get("kernels")
    missing = [] if version else ["the package kernels is not installed"]
    objection = _card(machine, HUB_KERNELS[name])
    missing += [objection] if objection else []
    if machine.offline and name not in machine.cached:
        missing.append("HF_HUB_OFFLINE is set and it is not in the cache")
    if missing:
        return KernelStatus(name, False, ", and ".join(missing), None if version else install_command("kernels"))
    place = "in the cache" if name in machine.cached else "downloaded from the hub when it is first used"
    return KernelStatus(name, True, f"kernels {version}, {place}")


def _card(machine: Machine, needed: int) -> str | None:
    if machine.capability is None:
        return "there is no CUDA device"
    if machine.capability[0] < needed:
        return f"it needs compute capability {needed}.0, this GPU has {machine.capability[0]}.{machine.capability[1]}"
    return None


def _flex(machine: Machine) -> KernelStatus:
    if machine.capability:
        return KernelStatus("flex_attention", True, "compiled by PyTorch for this GPU")
    if machine.compiler:
        return KernelStatus("flex_attention", True, f"forward only on a CPU; {COMPILES}")
    return KernelStatus("flex_attention", False, "on a CPU it needs a C++ compiler", "apt-get install g++")


def _versions(packages: list[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
