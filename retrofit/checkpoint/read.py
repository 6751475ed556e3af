"""Checkpoint folders, read tensor by tensor.

`Checkpoint.open` checks everything that can be checked without reading weights (every header, every length, every
name of the index), so that a broken folder is refused before any long work. `tensor` then reads one tensor into
memory of its own: nothing else is loaded, and nothing stays mapped.

File format: https://huggingface.co/docs/safetensors#format (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.checkpoint.cast import beyond, fits
from retrofit.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: where its bytes are. `offset` counts from the start of the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors weights, checked and not yet loaded.

    names: in the order of the bytes on disk (shard by shard), so that a pass over them reads sequentially.
    """

    folder: Path
    names: tuple[str, ...]
    config: dict[str, Any]
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Check the folder and read its headers.

        Raises UserError: no folder, no or broken config.json, no safetensors (pickles are never read), a shard that
        is missing, truncated or not safetensors, an index that names a tensor its shard does not hold.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError("there is no such checkpoint folder", where=str(folder), fix="check the path")
        config = read_json(folder / "config.json", missing="a checkpoint folder needs config.json")
        weight_map = _weight_map(folder)
        entries: dict[str, Entry] = {}
        for shard in sorted(set(weight_map.values())) if weight_map else (SINGLE,):
            held = read_header(folder / shard)
            if weight_map:
                listed = {name for name, file in weight_map.items() if file == shard}
                for name in sorted(listed - held.keys()):
                    raise UserError(
                        f"the index says that {shard} holds `{name}`, and it does not",
                        where=str(folder / INDEX),
                        fix="download the checkpoint again; the index and the shards are of different versions",
                    )
                held = {name: entry for name, entry in held.items() if name in listed}
            entries.update(held)
        if not entries:
            raise UserError("the checkpoint holds no tensors", where=str(folder), fix="download it again")
        names = sorted(entries, key=lambda name: (entries[name].shard, entries[name].offset))
        return cls(folder=folder, names=tuple(names), config=config, entries=entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def main_dtype(self) -> torch.dtype:
        """What most bytes are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            sizes[DTYPES[entry.dtype]] += entry.nbytes
        return sizes.most_common(1)[0][0]

    @property
    def shards(self) -> tuple[str, ...]:
        """File names of the weights."""
        return tuple(sorted({entry.shard for entry in self.entries.values()}))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        return DTYPES[self.entries[name].dtype]

    def shard_of(self, name: str) -> str:
        """File name of the shard that holds a tensor."""
        return self.entries[name].shard

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype, in memory of its own (writing to it changes no file)."""
        entry = self.entries[name]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        path = self.folder / entry.shard
        with path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            view = buffer.numpy().data
            done = 0
            while done < entry.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise UserError("the file became shorter while it was read", where=f"{path}: {name}")
                done += count
        return buffer.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def require_finite(self, names: Iterable[str] | None = None, *, written: torch.dtype | None = None) -> None:
        """Read every floating tensor once, one at a time; UserError names the first that holds a NaN or infinity.

        written: the dtype the weights will be written in, in which none may become infinite either.
        """
        for name in self.names if names is None else names:
            dtype = self.dtype(name)
            if not dtype.is_floating_point or prod(self.shape(name)) == 0:
                continue
            tensor = self.tensor(name)
            low, high = torch.aminmax(tensor.float() if dtype.itemsize == 1 else tensor)
            if torch.isfinite(low) and torch.isfinite(high):
                if written is not None and not fits(low, high, written):
                    raise beyond(name, written, str(self.folder / self.shard_of(name)))
                continue
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise UserError(
                f"`{name}` holds {bad} values that are NaN or infinite (of {tensor.numel()})",
                where=str(self.folder / self.shard_of(name)),
                fix="start from weights that are finite: download the checkpoint again, or use the state before",
            )


def read_json(path: Path, *, missing: str) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is absent or is not one."""
    if not path.is_file():
        raise UserError(missing, where=str(path), fix="point at the folder that holds the whole checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path.name} is not valid JSON ({error})", where=str(path), fix="download the file again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} must hold a JSON object", where=str(path), fix="download the file again")
    return value


def _weight_map(folder: Path) -> dict[str, str]:
    """{tensor: shard} of the index; empty for a single file."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return {}
        raise _no_weights(folder)
    weight_map = read_json(folder / INDEX, missing="").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError("the index has no weight_map", where=str(folder / INDEX), fix="download the file again")
    for name, shard in sorted(weight_map.items()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"the index puts `{name}` into {shard!r}, which is not a safetensors file of this folder",
                where=str(folder / INDEX),
                fix="use a checkpoint in safetensors format",
            )
        if not (folder / shard).is_file():
            raise UserError(
                f"the index names {shard}, and the folder does not hold it (first tensor: `{name}`)",
                where=str(folder / INDEX),
                fix=f"download {shard} into the folder",
            )
    return weight_map


def _no_weights(folder: Path) -> UserError:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in files if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return UserError(
            f"the weights are stored as a pickle ({pickles[0]}); pickles can run code and are never read",
            where=str(folder / pickles[0]),
            fix="use a revision with model.safetensors, or convert the weights with the model's own tools",
        )
    if "adapter_model.safetensors" in files:
        return UserError(
            "this is an adapter, not a whole model",
            where=str(folder / "adapter_model.safetensors"),
            fix="merge the adapter into its base model first (peft: merge_and_unload)",
        )
    return UserError(
        f"the folder holds no {SINGLE} and no {INDEX}",
        where=str(folder),
        fix="point at a folder with safetensors weights, or at a .gguf file",
    )


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises UserError when the file is truncated or its header is broken."""
    if not path.is_file():
        raise UserError(f"{path.name} is missing", where=str(path), fix="download the file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise UserError(
                f"{path.name} is a Git LFS pointer, not the weights", where=str(path), fix="run `git lfs pull` there"
            )
        if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise _broken(path, f"its header says {length} bytes and the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {
            name: Entry(
                shard=path.name,
                dtype=str(value["dtype"]),
                shape=tuple(int(n) for n in value["shape"]),
                offset=8 + length + int(value["data_offsets"][0]),
                nbytes=int(value["data_offsets"][1]) - int(value["data_offsets"][0]),
            )
            for name, value in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _broken(path, f"its header cannot be read: {error}") from error
    _check_layout(path, entries, 8 + length, size)
    return entries


def _check_layout(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors lie one after the other and fill the file exactly."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.dtype not in DTYPES:
            raise UserError(
                f"`{name}` has dtype {entry.dtype}, which is not supported",
                where=str(path),
                fix="use a checkpoint in float32, bfloat16 or float16",
            )
        if entry.nbytes != prod(entry.shape) * DTYPES[entry.dtype].itemsize or entry.offset != end:
            raise _broken(path, f"the place of `{name}` does not fit its shape {list(entry.shape)}")
        end = entry.offset + entry.nbytes
    if size < end:
        raise _broken(path, f"it has {size} bytes and its header promises {end}")
    if size > end:
        raise _broken(path, f"it has {size} bytes, {size - end} more than its header promises")


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path.name} is truncated or corrupt: {why}", where=str(path), fix=f"download {path.name} again")
