"""Residual streams on disk, layer by layer, and how far a pass over the layers has come.

A layer reads the streams of its own parity and writes those of the other, so whatever a kill leaves of it is written
again from inputs that are still whole. state.json is replaced last. Files are plain reads and writes of one batch, not
memory maps: nothing of them stays resident, and a full disk is an error instead of a bus error.

Legend: B sequences of a batch, T tokens, C width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.staging import free_space, require_writable
from retrofit.errors import UserError
from retrofit.format import nbytes
from retrofit.kv_heads import VERSION
from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.system.dealing import collected
from retrofit.system.device import stream_place
from retrofit.system.world import ALONE, World

STATE = "state.json"


class StreamFolder:
    """Streams into the present layer and out of it, and how many layers are done.

    They are files, so that a killed pass resumes; on a GPU, where they fit, they are also kept in memory and read from
    there (`stream_place`). What is needed within one layer is then not written at all.

    key: names everything that the bytes depend on; a folder with another key, and a folder whose files are not what
    its state says, is emptied and announced. shapes: [B, T, C] of every batch. layers: of the model. within: files of
    what is needed within one layer. whole: raises where what layer `i` left elsewhere is not whole. to_the_end: the
    streams behind the last layer are read as well.

    own: numbers of the batches that this process writes and reads, all by default. The other processes of `world` have
    the rest, in the same files, at places of their own; rank 0 alone judges, empties and commits. What is committed is
    the same whoever wrote it, so another number of processes resumes it.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        *,
        layers: int,
        within: Sequence[DiskTensors] = (),
        whole: Callable[[int], object] = lambda index: None,
        to_the_end: bool = False,
        device: str = "cpu",
        own: Sequence[int] | None = None,
        world: World = ALONE,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self._key, self._names, self._layers = folder, key, tuple(names), layers
        self._whole, self._to_the_end = whole, to_the_end
        self._own, self._world = tuple(range(len(shapes)) if own is None else own), world
        self._streams = {
            (name, parity): DiskTensors(folder / f"{name}-{parity}", shapes) for name in names for parity in (0, 1)
        }
        self._files = (*self._streams.values(), *within)
        place = stream_place(device, sum(file.nbytes for file in self._files))
        for file in self._files if place != "disk" else ():
            file.keep(device if place == "device" else "cpu", written=file not in within)
        self.resumed_from = world.only(lambda: self._resume(say))
        self.layers_done = self.resumed_from or 0

    def stream(self, name: str, layer: int) -> DiskTensors:
        """The stream of that name as it enters `layer`."""
        return self._streams[name, layer % 2]

    @property
    def whole_before(self) -> bool:
        """Whether an earlier attempt finished every layer."""
        return self.resumed_from == self._layers

    def started(self) -> None:
        """All streams enter layer 0."""
        self._commit(0)

    def finished(self, layer: int) -> None:
        """The streams into the next layer are written, and what this one leaves elsewhere."""
        self._commit(layer + 1)

    def drop_streams(self) -> None:
        """All layers are done: only their results are read from here on."""
        for tensors in self._files:
            tensors.forget()
            if self._world.main:
                tensors.path.unlink(missing_ok=True)

    def _commit(self, layers_done: int) -> None:
        self.layers_done = layers_done
        for name in self._names:
            self.stream(name, layers_done).settle()
            self.stream(name, layers_done - 1).forget()
        checksums = {name: self._checksums(self.stream(name, layers_done)) for name in self._names}
        if self._world.main:
            partial = self.folder / f".{STATE}.partial"
            partial.write_text(json.dumps({"key": self._key, "layers": layers_done, "checksums": checksums}), "utf-8")
            partial.replace(self.folder / STATE)
        self._world.wait()  # nobody overwrites the streams of the state before

    def _checksums(self, tensors: DiskTensors) -> list[int]:
        """Of every batch, each from the process that wrote it."""
        written = collected({index: tensors.checksums[index] for index in self._own}, self._world)
        return [written[index] for index in sorted(written)]

    def _resume(self, say: Callable[[str], None]) -> int | None:
        """Layers that an earlier attempt finished; None for a fresh start, which reserves the streams."""
        state, objection = self._state()
        if state is not None:
            return int(state["layers"])
        if objection:
            say(f"the work folder {self.folder} {objection}: started again")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        require_room(self.folder, sum(file.nbytes for file in self._files))
        self.folder.mkdir(parents=True)
        for file in self._files:
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
                return None, "belongs to another model, text or conversion"
            done = int(state["layers"])
            for index in range(done):
                self._whole(index)
            streams = {name: list(state["checksums"][name]) for name in self._names}
        except (ValueError, KeyError, TypeError, OSError, SafetensorError, UserError) as error:
            return None, f"is damaged ({error})"
        if done == self._layers and not self._to_the_end:  # what is left to do reads no stream
            return state, ""
        for name, checksums in streams.items():
            if not self.stream(name, done).whole(checksums):
                return None, f"is damaged (the stream {self.stream(name, done).path.name} is not whole)"
        for file in self._files:
            if not file.path.is_file() or file.path.stat().st_size != file.nbytes:
                file.create()
        return state, ""


def work_key(checkpoint: Checkpoint, *parts: object) -> str:
    """Names everything that the bytes of a work folder depend on: the code, the weights, and `parts`, as JSON values.

    Weights are known by their headers and times here; whoever chooses the folder knows them by their digests.
    """
    stats = [(checkpoint.folder / shard).stat() for shard in checkpoint.shards]
    known = [
        VERSION,
        torch.__version__,
        [[s.st_size, s.st_mtime_ns] for s in stats],
        {name: list(entry.shape) for name, entry in checkpoint.entries.items()},
        *parts,
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def require_room(folder: Path, needed: int) -> None:
    """UserError when the disk of `folder` has less than `needed` bytes for a calibration."""
    require_writable(folder)
    free = free_space(folder)
    if free < needed:
        raise UserError(
            f"no room for the residual streams and layers of a conversion: {nbytes(needed)} ({needed} bytes) needed, "
            f"{nbytes(free)} free",
            where=str(folder),
            fix="lower `convert.calibration.tokens` (`--tokens`), free space there, or write to another disk",
        )
