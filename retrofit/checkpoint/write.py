"""Checkpoint folders, written in one pass.

`ShardWriter` keeps room for the header at the start of each safetensors file and fills it in (padded with spaces, as
the format allows) when the file is complete, so no tensor is held back and no byte is written twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from retrofit.checkpoint.config import without_run_fields
from retrofit.checkpoint.files import INDEX, SINGLE
from retrofit.checkpoint.header import read_header
from retrofit.checkpoint.raw import copy_bytes, shift, write_all, write_back
from retrofit.checkpoint.read import DTYPES
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.schema import parse_size as bytes_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from retrofit.console import Progress

T = TypeVar("T")

HEADER_RESERVE = 16 << 10
FLUSH_BYTES = 64 << 20
KEPT = "{} weight files were written before, and are kept"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Fields that other engines read and that must not depend on a class default of one transformers version.
EXPLICIT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "multi_query",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "layer_rope_theta",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "tie_word_embeddings",
    "vocab_size",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
)


def parse_size(size: str | int) -> int:
    """Bytes of "5GB" (powers of ten, as on the hub)."""
    if isinstance(size, int):
        return size
    nbytes = bytes_of(size)
    if not nbytes:
        raise UserError(f"{shown(size, 60)!r} is not a size", fix="write for example 5GB or 500MB")
    return nbytes


class StaleShards(Exception):  # noqa: N818 - control flow, not an error
    """Shards of an interrupted writer hold something else; the argument names the first."""


class ShardWriter:
    """Writes tensors as they come into `model.safetensors`, or shards with an index when they exceed `max_shard_size`.

    Use as a context manager, or call `close`; the index is written last. The order of the tensors is the order of
    `add`, and every name is written, tensors that share their memory as well: a reader that looks for a tied embedding
    by its name finds it. `header_reserve`: bytes kept for each header; a longer one moves the data once.

    resume: the folder may hold shards that an interrupted writer of the same tensors finished; they are not written
    again. A shard is whole when it has its header, which is written last, and the size that this promises; when it
    does not hold what would have been written, `StaleShards` is raised.
    """

    def __init__(
        self,
        folder: str | Path,
        max_shard_size: str | int = "5GB",
        metadata: Mapping[str, str] | None = None,
        *,
        header_reserve: int = HEADER_RESERVE,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.limit = parse_size(max_shard_size)
        self.metadata = {"format": "pt", **(metadata or {})}
        self.reserve = -(-max(header_reserve, 64) // 8) * 8
        self.nbytes = 0
        self.shards: tuple[str, ...] = ()
        self._headers: list[dict[str, dict[str, Any]]] = []
        self._names: set[str] = set()
        self._file: FileIO | None = None
        self._offset = self._flushed = 0
        self._resume = resume
        self._completing = ThreadPoolExecutor(1)
        self._completed: list[Future[None]] = []
        self._finished = self._found() if resume else frozenset()

    @property
    def kept(self) -> int:
        """Shards that were there already."""
        return len(self._finished)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._completing:  # waits for the shards whose data is on its way to the disk
            if kind is None:
                self.close()
            elif self._file:
                self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it is not kept."""
        dense = tensor.detach().to("cpu").contiguous()
        file = self._begin(name, _DTYPE_NAMES[dense.dtype], tuple(dense.shape), dense.nbytes)
        if dense.nbytes and file:
            write_all(file, dense.reshape(-1).view(torch.uint8).numpy().data)
            self._start_flush(file)

    def copy(self, name: str, dtype: str, shape: tuple[int, ...], source: FileIO, offset: int, nbytes: int) -> None:
        """Copy the bytes of a stored tensor without decoding them. `dtype` is the safetensors name ("BF16")."""
        file = self._begin(name, dtype, shape, nbytes)
        if file:
            copy_bytes(source, offset, file, nbytes)
            self._start_flush(file)

    def close(self) -> tuple[str, ...]:
        """Complete the headers, name the shards and write the index. Returns the file names; twice does no harm."""
        if self.shards:
            return self.shards
        if not self._headers:
            raise ValueError("no tensor was added")
        self._finish_shard()
        for completed in self._completed:
            completed.result()
        total = len(self._headers)
        if total == 1:
            self._part(0).rename(self.folder / SINGLE)
            self.shards = (SINGLE,)
            return self.shards
        names = tuple(f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total))
        weight_map = {}
        for i, shard in enumerate(names):
            self._part(i).rename(self.folder / shard)
            weight_map.update(dict.fromkeys(self._headers[i], shard))
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self.shards = names
        return names

    def _part(self, index: int) -> Path:
        return self.folder / f".shard-{index:05d}"

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"{name} was already written")
        self._names.add(name)

    def _begin(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> FileIO | None:
        """Record a tensor, in a new shard when the present one is full or would misalign it. None: it is there."""
        self._claim(name)
        full = self._offset and self._offset + nbytes > self.limit
        if not self._headers or full or self._offset % DTYPES[dtype].itemsize:
            self._finish_shard()
            if len(self._headers) not in self._finished:
                self._file = FileIO(self._part(len(self._headers)), "w+")
                self._file.seek(8 + self.reserve)
            self._headers.append({})
            self._offset = self._flushed = 0
        end = self._offset + nbytes
        self._headers[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._offset, end]}
        self._offset = end
        self.nbytes += nbytes
        return self._file

    def _finish_shard(self) -> None:
        if not self._headers:
            return
        raw = json.dumps({"__metadata__": self.metadata, **self._headers[-1]}, separators=(",", ":")).encode()
        length = max(self.reserve, -(-len(raw) // 8) * 8)
        header = length.to_bytes(8, "little") + raw.ljust(length)
        if self._file is None:
            part = self._part(len(self._headers) - 1)
            with part.open("rb") as file:
                if file.read(len(header)) != header or part.stat().st_size != len(header) + self._offset:
                    raise StaleShards(str(part))
            return
        if length > self.reserve:
            shift(self._file, 8 + self.reserve, self._offset, length - self.reserve)
        complete, self._file = self._file, None
        if self._resume:  # the next shard is written while the disk takes this one, and one at a time
            if self._completed:
                self._completed[-1].result()
            self._completed.append(self._completing.submit(_complete, complete, header, sync=True))
        else:
            _complete(complete, header, sync=False)

    def _start_flush(self, file: FileIO) -> None:
        """Let the disk begin with what was written since the last call: waiting for all of it at the end takes
        longer."""
        if self._offset - self._flushed >= FLUSH_BYTES:
            write_back(file, 8 + self.reserve + self._flushed, self._offset - self._flushed)
            self._flushed = self._offset

    def _found(self) -> frozenset[int]:
        """Numbers of the shards that are whole; others are removed, and names given by `close` taken back."""
        for path in self.folder.glob("model-*-of-*.safetensors"):
            path.rename(self._part(int(path.name.split("-")[1]) - 1))
        if (self.folder / SINGLE).is_file():
            (self.folder / SINGLE).rename(self._part(0))
        (self.folder / INDEX).unlink(missing_ok=True)
        whole = set()
        for path in self.folder.glob(".shard-*"):
            try:
                read_header(path)
            except UserError:
                path.unlink()
            else:
                whole.add(int(path.name.removeprefix(".shard-")))
        return frozenset(whole)


def _complete(file: FileIO, header: bytes, *, sync: bool) -> None:
    """Write the header of a shard, after its data is on the disk where that is asked for, and close it."""
    with file:
        if sync:  # a header on disk means that the data is; macOS has no fdatasync
            getattr(os, "fdatasync", os.fsync)(file.fileno())
        file.seek(0)
        write_all(file, memoryview(header))


def held(folder: str | Path) -> int:
    """Bytes of weights that an interrupted writer left in the folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("*") if path.is_file())


def going_on(write: Callable[[bool], T], folder: str | Path, resume: bool, progress: Progress | None) -> T:
    """What `write(resume)` gives; written again from the start, and announced, where shards that an interrupted writer
    left in the folder hold something else."""
    try:
        return write(resume)
    except StaleShards as stale:
        if progress:
            progress.note(f"{stale} holds something else than what is being written: all weights are written again")
        remove_shards(folder)
        return write(False)


def remove_shards(folder: str | Path) -> int:
    """Remove what a `ShardWriter` left in the folder, whole or not. Returns the number of shards."""
    folder = Path(folder)
    (folder / INDEX).unlink(missing_ok=True)
    shards = [*folder.glob(".shard-*"), *folder.glob("model-*-of-*.safetensors"), *folder.glob(SINGLE)]
    for path in shards:
        path.unlink()
    return len(shards)


def write_config(
    out: str | Path, config: Mapping[str, Any] | PretrainedConfig, dtype: str | torch.dtype | None = None
) -> dict[str, Any]:
    """Write config.json and return what was written.

    A mapping is written as it is; of a PretrainedConfig what differs from its class defaults, and always the fields
    that decide about the attention. dtype: recorded as the dtype of the weights when given.
    """
    if isinstance(config, Mapping):
        fields = dict(config)
    else:
        full = config.to_dict()
        fields = {**{key: full[key] for key in EXPLICIT_FIELDS if key in full}, **config.to_diff_dict()}
        fields["model_type"] = config.model_type
    fields = without_run_fields(fields)
    for key in ("_name_or_path", "auto_map"):
        fields.pop(key, None)
    if dtype is not None:
        fields.pop("torch_dtype", None)
        fields["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False, default=str)
    (Path(out) / "config.json").write_text(text + "\n", encoding="utf-8")
    return fields
