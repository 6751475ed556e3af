"""Tensors in a file, read and written one at a time; where memory is plenty they are kept there as well.

Files are plain reads and writes, not memory maps: nothing of them stays resident, and a full disk is an error instead
of a bus error.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from retrofit.errors import UserError

_ITEM = 4  # bytes of a float32


class DiskTensors:
    """N float32 tensors of given shapes in one file."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
        self.path, self._shapes = path, [torch.Size(shape) for shape in shapes]
        self._offsets = [0]
        for shape in self._shapes:
            self._offsets.append(self._offsets[-1] + shape.numel() * _ITEM)
        self.checksums: list[int] = [0] * len(self._shapes)
        self._place: str | None = None
        self._written = True
        self._kept: dict[int, Tensor] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._writes: list[Future[None]] = []

    def keep(self, device: str, *, written: bool) -> None:
        """Keep what is written on this device too, and read it from there. A thread writes the file meanwhile.

        written: False for what is not needed in the file at all.
        """
        self._place, self._written = device, written

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._offsets[-1]

    def shape(self, index: int) -> torch.Size:
        """Shape of tensor `index`."""
        return self._shapes[index]

    def create(self) -> None:
        """Make the whole file. Where the system can reserve its room, none is an error now and not in the middle."""
        with self.path.open("wb") as file:
            if self.nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.nbytes)
            else:  # macOS
                file.truncate(self.nbytes)

    def write(self, index: int, tensor: Tensor) -> None:
        """Write tensor `index`, wherever it is, as float32."""
        assert tensor.shape == self._shapes[index]
        if self._place is None:
            self._to_file(index, tensor.detach())
            return
        kept = tensor.detach().to(self._place, torch.float32, copy=True)
        self._kept[index] = kept
        if self._written:
            self._writer = self._writer or ThreadPoolExecutor(1)
            self._writes.append(self._writer.submit(self._to_file, index, kept))

    def settle(self) -> None:
        """Return when the file holds what was written. Raises what a write raised."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def forget(self) -> None:
        """Let go of what is kept in memory."""
        self.settle()
        self._kept.clear()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _to_file(self, index: int, tensor: Tensor) -> None:
        view = _bytes(tensor.to("cpu", torch.float32).contiguous())
        self.checksums[index] = zlib.crc32(view)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._offsets[index])
            while view:
                view = view[file.write(view) :]

    def read(self, index: int, device: str = "cpu") -> Tensor:
        """Tensor `index`, in memory of its own."""
        return self._kept[index].to(device, copy=True) if index in self._kept else self._from_file(index).to(device)

    def _from_file(self, index: int) -> Tensor:
        tensor = torch.empty(self._shapes[index])
        view = _bytes(tensor)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offsets[index])
            while view:
                count = file.readinto(view)
                if not count:
                    raise UserError("the file became shorter while it was read", where=str(self.path))
                view = view[count:]
        return tensor

    def whole(self, checksums: Sequence[int]) -> bool:
        """Whether the file has its size and these checksums."""
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes or len(checksums) != len(self._shapes):
            return False
        return all(zlib.crc32(_bytes(self._from_file(index))) == checksum for index, checksum in enumerate(checksums))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")
