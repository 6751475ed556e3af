"""What differs by device, decided here and nowhere else: sizes that fill it, and what it waits for.

On a CPU every number is what the processor's caches and a person's patience ask for. A GPU needs more rows at a time,
or it spends its time launching kernels; how many follows from its memory, in powers of two, so that one card gives the
same numbers every time, whatever else holds memory on it.
"""

from __future__ import annotations

from collections.abc import Callable

from retrofit.errors import UserError


def is_gpu(device: str) -> bool:
    """Whether work on this device runs beside the program, which then must not wait for every result of it."""
    return device.partition(":")[0] in ("cuda", "mps")


def steps_between_readings(device: str) -> int:
    """Training steps whose losses are read together. Reading one waits until the GPU has done all it was given."""
    return 16 if is_gpu(device) else 1


def micro_batch(rows: int, attempt: Callable[[int], None], device: str) -> int:
    """Rows of a training step that are computed at a time: all on a CPU, on a GPU the largest divisor that fits.

    attempt: runs one forward and backward pass of so many rows; raises torch.OutOfMemoryError where they do not fit.

    Raises: UserError where not even one row fits.
    """
    if not is_gpu(device):
        return rows
    import torch

    for size in (size for size in range(rows, 0, -1) if rows % size == 0):
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            continue
        return size
    raise UserError(
        f"one row of training does not fit into the memory of {device}",
        where="recover",
        fix="set recover.gradient_checkpointing: true, or lower recover.sequence_length",
    )
