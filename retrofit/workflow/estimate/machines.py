"""What a machine has: this one, or a GPU that is not there, for a plan of what a run would take on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retrofit.checkpoint.staging import free_space
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.format import nbytes
from retrofit.system.memory import total_memory
from retrofit.workflow.estimate.cost import Cost, Throughput

MOST_GPUS = 1024


@dataclass(frozen=True)
class Machine:
    """What the steps of a plan have to fit. memory, disk: bytes, None where it is not known.

    gpus: that a run is started on, one process each.
    """

    name: str
    memory: int | None
    disk: int | None = None
    gpus: int = 1


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense bfloat16 and float32 TFLOP/s, GB of memory, TB/s of bandwidth.

    link: GB/s that one sends to another of the same machine while it receives as much (NVLink, else PCIe). launch:
    microseconds that launching a small kernel takes a usual processor beside it.
    """

    bfloat16: float
    float32: float
    memory: int
    bandwidth: float
    link: float
    launch: float = 10.0


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(989, 67, 80, 3.35, 450),
    "h200": Gpu(989, 67, 141, 4.8, 450),
    "a100": Gpu(312, 19.5, 80, 2.04, 300),
    "l40s": Gpu(362, 91.6, 48, 0.864, 32),
    "4090": Gpu(165, 82.6, 24, 1.01, 32),
}


def planned_for(name: str, gpus: int = 1) -> tuple[Machine, Throughput]:
    """A machine with `gpus` GPUs of this name, and how fast they are. Raises UserError for a name that is not known."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise UserError(f"no GPU `{shown(name, 40)}` is known", where="--gpu", fix=f"use one of {', '.join(GPUS)}")
    if not 1 <= gpus <= MOST_GPUS:
        raise UserError(f"{gpus} GPUs are no number of them", where="--gpus", fix=f"use 1 to {MOST_GPUS:,}")
    how = f"{gpu.bfloat16:g} TFLOP/s in bfloat16 and {gpu.float32:g} in float32, the data sheet of the {name.upper()}"
    how += f", and {gpu.launch:g} us to launch a kernel"
    speed = Throughput(
        gpu.bfloat16 * 1e12,
        gpu.float32 * 1e12,
        how,
        gpu.bandwidth * 1e12,
        gpu.launch * 1e-6,
        gpus=gpus,
        link_bytes_per_second=gpu.link * 1e9,
    )
    return Machine(name.upper(), gpu.memory * 10**9, gpus=gpus), speed


def this_machine(device: str, folder: Path) -> Machine:
    """The machine that the plan is made on. folder: where the run would be written."""
    return Machine("this machine", total_memory(device), free_space(folder))


def lacking(cost: Cost, before: int, machine: Machine) -> str:
    """What a step has not enough of, "memory and disk" at most. before: bytes that earlier steps have written."""
    short = []
    if machine.memory is not None and cost.peak_bytes > machine.memory:
        short.append("memory")
    if machine.disk is not None and before + cost.disk_bytes > machine.disk:
        short.append("disk")
    return " and ".join(short)


def described(machine: Machine) -> str:
    """A line about what is compared with."""
    has = [f"{nbytes(machine.memory)} of memory"] if machine.memory is not None else []
    has += [f"{nbytes(machine.disk)} of free disk"] if machine.disk is not None else []
    line = f"fits: compared with {machine.name}, {' and '.join(has) or 'of which nothing is known'}"
    if machine.gpus > 1:
        line += (
            f" for each of {machine.gpus} GPUs, one process each: torchrun --nproc-per-node={machine.gpus} -m retrofit"
        )
    return line
