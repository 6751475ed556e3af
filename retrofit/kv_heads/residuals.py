"""The work folder of a calibrated conversion: both residual streams, and every layer that is done.

    state.json                what the folder belongs to, how many layers are done, checksums of their streams
    original-0, original-1    residual stream of the original model, before and after the present layer by turns
    converted-0, converted-1  the same of the layers converted so far
    targets, heads            what is per token within one layer
    layer-007.safetensors     a finished layer's changed tensors, and its report

A layer reads the streams of its own parity and writes those of the other, so whatever a kill leaves of it is written
again from inputs that are still whole. state.json is replaced last. Files are plain reads and writes of one batch, not
memory maps: nothing of them stays resident, and a full disk is an error instead of a bus error.

Legend: N batches, B sequences of a batch, T tokens, C width.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrofit.checkpoint.place import free_space, link_or_copy, require_writable
from retrofit.console import nbytes
from retrofit.errors import UserError
from retrofit.kv_heads.moments import Origin
from retrofit.kv_heads.outcome import LayerReport

STATE = "state.json"
STREAMS = ("original", "converted")
_ITEM = 4  # bytes of a float32


class DiskTensors:
    """N float32 tensors of given shapes in one file, read and written one at a time."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
        self.path, self._shapes = path, [torch.Size(shape) for shape in shapes]
        self._offsets = [0]
        for shape in self._shapes:
            self._offsets.append(self._offsets[-1] + shape.numel() * _ITEM)
        self.checksums: list[int] = [0] * len(self._shapes)

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
        view = _bytes(tensor.detach().to("cpu", torch.float32).contiguous())
        self.checksums[index] = zlib.crc32(view)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._offsets[index])
            while view:
                view = view[file.write(view) :]

    def read(self, index: int, device: str = "cpu") -> Tensor:
        """Tensor `index`, in memory of its own."""
        tensor = torch.empty(self._shapes[index])
        view = _bytes(tensor)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offsets[index])
            while view:
                count = file.readinto(view)
                if not count:
                    raise UserError("the file became shorter while it was read", where=str(self.path))
                view = view[count:]
        return tensor.to(device)

    def whole(self, checksums: Sequence[int]) -> bool:
        """Whether the file has its size and these checksums."""
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes or len(checksums) != len(self._shapes):
            return False
        return all(zlib.crc32(_bytes(self.read(index))) == checksum for index, checksum in enumerate(checksums))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")


@dataclass(frozen=True)
class Shapes:
    """Shapes of every batch's tensors: residual stream [B, T, C] and head outputs [B, T, H D]."""

    hidden: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, batches: Sequence[tuple[int, int]], width: int, heads_width: int) -> Shapes:
        """batches: (B, T) of each."""
        return cls(tuple((*b, width) for b in batches), tuple((*b, heads_width) for b in batches))


class WorkFolder:
    """Streams and finished layers of one conversion on disk.

    key: names everything that the bytes depend on; a folder with another key, and a folder whose files are not what
    its state says, is emptied and announced. layers: of the model; repairs: whether what they read is kept as well.
    """

    def __init__(
        self, folder: Path, key: str, shapes: Shapes, *, layers: int, repairs: bool, say: Callable[[str], None]
    ) -> None:
        self.folder, self._key, self._layers = folder, key, layers
        self._streams = {
            (name, parity): DiskTensors(folder / f"{name}-{parity}", shapes.hidden)
            for name in STREAMS
            for parity in (0, 1)
        }
        # What only repairs read is not kept without them.
        self.targets = DiskTensors(folder / "targets", shapes.hidden if repairs else ())
        self.heads = DiskTensors(folder / "heads", shapes.heads if repairs else ())
        self.layers_done = 0
        self.resumed_from = self._resume(say)

    def stream(self, name: str, layer: int) -> DiskTensors:
        """The stream `original` or `converted` as it enters `layer`."""
        return self._streams[name, layer % 2]

    @property
    def whole_before(self) -> bool:
        """Whether an earlier attempt finished every layer."""
        return self.resumed_from == self._layers

    @property
    def moments(self) -> Path:
        """Folder of the moments of finished layers."""
        return self.folder / "moments"

    def started(self) -> None:
        """Both streams enter layer 0."""
        self._commit(0)

    def finish_layer(self, report: LayerReport, tensors: Mapping[str, Tensor]) -> None:
        """Keep a layer that is done; its streams into the next one are written."""
        path = self._layer(report.index)
        partial = path.with_name(f".{path.name}.partial")
        save_file(dict(tensors), partial, metadata={"report": json.dumps(asdict(report))})
        partial.replace(path)
        self._commit(report.index + 1)

    def reports(self) -> list[LayerReport]:
        """Of every finished layer."""
        return [self._report(index) for index in range(self.layers_done)]

    def tensor_names(self) -> dict[str, int]:
        """{changed tensor: its layer}, of finished layers."""
        names: dict[str, int] = {}
        for index in range(self.layers_done):
            with safe_open(self._layer(index), "pt") as file:
                names |= dict.fromkeys(file.keys(), index)
        return names

    def tensor(self, layer: int, name: str) -> Tensor:
        """A changed tensor of a finished layer."""
        with safe_open(self._layer(layer), "pt") as file:
            return file.get_tensor(name)

    def copy_moments(self, to: Path, origin: Origin) -> None:
        """Give all layers' moments a place of their own, whole or not at all."""
        partial = to.with_name(f".{to.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in sorted(self.moments.glob("layer-*.safetensors")):
            link_or_copy(path, partial / path.name)
        origin.write(partial)
        if to.exists():
            shutil.rmtree(to)
        partial.replace(to)

    def drop_streams(self) -> None:
        """All layers are done: only their results are read from here on."""
        for tensors in (*self._streams.values(), self.targets, self.heads):
            tensors.path.unlink(missing_ok=True)

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:03d}.safetensors"

    def _report(self, index: int) -> LayerReport:
        with safe_open(self._layer(index), "pt") as file:
            return LayerReport.of(json.loads(file.metadata()["report"]))

    def _commit(self, layers_done: int) -> None:
        self.layers_done = layers_done
        checksums = {name: self.stream(name, layers_done).checksums for name in STREAMS}
        partial = self.folder / f".{STATE}.partial"
        partial.write_text(json.dumps({"key": self._key, "layers": layers_done, "checksums": checksums}))
        partial.replace(self.folder / STATE)

    def _resume(self, say: Callable[[str], None]) -> int | None:
        """Layers that an earlier attempt finished; None for a fresh start, which reserves the streams."""
        state, objection = self._state()
        if state is not None:
            self.layers_done = state["layers"]
            for name in STREAMS:
                self.stream(name, self.layers_done).checksums = list(state["checksums"][name])
            return self.layers_done
        if objection:
            say(f"the work folder {self.folder} {objection}: started again")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        files = (*self._streams.values(), self.targets, self.heads)
        require_room(self.folder, sum(file.nbytes for file in files))
        self.folder.mkdir(parents=True)
        for file in files:
            file.create()
        return None

    def _state(self) -> tuple[dict[str, Any] | None, str]:
        """The state of an earlier attempt, or what is wrong with it (nothing where there is none)."""
        path = self.folder / STATE
        if not path.is_file():
            return None, "was left before its streams were whole" if self.folder.exists() else ""
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["key"] != self._key:
                return None, "belongs to another conversion"
            done = int(state["layers"])
            [self._report(index) for index in range(done)]
            streams = {name: list(state["checksums"][name]) for name in STREAMS}
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            return None, f"is damaged ({error})"
        if done == self._layers:  # what is left to do reads no stream
            return state, ""
        for name, checksums in streams.items():
            if not self.stream(name, done).whole(checksums):
                return None, f"is damaged (the stream {self.stream(name, done).path.name} is not whole)"
        for file in (*self._streams.values(), self.targets, self.heads):
            if not file.path.is_file() or file.path.stat().st_size != file.nbytes:
                file.create()
        return state, ""


def require_room(folder: Path, needed: int) -> None:
    """UserError when the disk of `folder` has less than `needed` bytes for a calibration."""
    require_writable(folder)
    free = free_space(folder)
    if free < needed:
        raise UserError(
            f"no room for the residual streams and layers of a conversion: {nbytes(needed)} ({needed} bytes) needed, "
            f"{nbytes(free)} free",
            where=str(folder),
            fix="lower `convert.calibration.tokens`, free space there, or write to another disk",
        )
