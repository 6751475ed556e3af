"""Checkpoint folders, read tensor by tensor.

`Checkpoint.open` checks everything that can be checked without reading weights (which files they are, every header,
every length, every name of the index), so that a broken folder is refused before any long work. `tensor` then reads
one tensor into memory of its own: nothing else is loaded, and nothing stays mapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.checkpoint.cast import beyond, fits
from retrofit.checkpoint.files import CONFIG, INDEX, WeightFiles, others, weight_files
from retrofit.checkpoint.header import Entry, read_header
from retrofit.checkpoint.scan import scan
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import read_json

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

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors weights, checked and not yet loaded.

    names: in the order of the bytes on disk (shard by shard), so that a pass over them reads sequentially.
    """

    folder: Path
    files: WeightFiles
    names: tuple[str, ...]
    config: dict[str, Any]
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Check the folder and read its headers.

        Raises UserError: no folder, no or broken config.json, files that are no checkpoint or more than one (see
        `weight_files`), a shard that is truncated or not safetensors, tensors that two files hold, an index that names
        others than its shards hold.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError("there is no such checkpoint folder", where=shown(folder), fix="check the path")
        config = read_json(folder / CONFIG, missing=f"a checkpoint folder needs {CONFIG}")
        files = weight_files(folder)
        named = config.get("transformers_weights")
        if named not in (None, INDEX if files.weight_map else files.shards[0]):
            raise UserError(
                f"{CONFIG} says that the weights are in {shown(named, 120)}, where transformers alone looks for them",
                where=f"{shown(folder / CONFIG)}: transformers_weights",
                fix="remove that line, or give the folder of those weights",
            )
        entries = _entries(folder, files)
        if not entries:
            raise UserError("the checkpoint holds no tensors", where=shown(folder), fix="download it again")
        _require_no_copies(folder, files, entries)
        names = sorted(entries, key=lambda name: (entries[name].shard, entries[name].offset))
        return cls(folder=folder, files=files, names=tuple(names), config=config, entries=entries)

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
        return self.files.shards

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
                    raise UserError(
                        "the file became shorter while it was read", where=f"{shown(path)}: {shown(name, 120)}"
                    )
                done += count
        return buffer.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values: bytes are compared piece by piece where the dtypes agree."""
        if self.shape(one) != self.shape(other):
            return False
        if self.dtype(one) == self.dtype(other) and self._same_bytes(self.entries[one], self.entries[other]):
            return True
        wide = torch.promote_types(self.dtype(one), self.dtype(other))
        return torch.equal(self.tensor(one).to(wide), self.tensor(other).to(wide))

    def _same_bytes(self, one: Entry, other: Entry) -> bool:
        with (self.folder / one.shard).open("rb") as first, (self.folder / other.shard).open("rb") as second:
            first.seek(one.offset)
            second.seek(other.offset)
            return all(
                first.read(size) == second.read(size)
                for size in (min(_PIECE_BYTES, one.nbytes - at) for at in range(0, one.nbytes, _PIECE_BYTES))
            )

    def require_finite(
        self,
        names: Iterable[str] | None = None,
        *,
        written: torch.dtype | None = None,
        digested: Collection[str] = (),
    ) -> Mapping[str, str]:
        """Read every floating tensor once, by several threads; UserError names the first with a NaN or infinity.

        written: the dtype the weights will be written in, in which none may become infinite either. digested: shards
        whose SHA-256 is wanted, by name; they are hashed on the way, so that nothing is read twice for it.
        """
        asked = self.names if names is None else tuple(names)
        found = scan(self.folder, self.entries, DTYPES, asked, digested)
        for name in asked:
            if name not in found.extremes:
                continue
            extremes = found.extremes[name]
            if bool(torch.isfinite(extremes).all()):
                if written is not None and not fits(extremes[0], extremes[1], written):
                    raise beyond(name, written, str(self.folder / self.shard_of(name)))
                continue
            tensor = self.tensor(name)
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise UserError(
                f"`{shown(name, 120)}` holds {bad} values that are NaN or infinite (of {tensor.numel()})",
                where=shown(self.folder / self.shard_of(name)),
                fix="start from weights that are finite: download the checkpoint again, or use the state before",
            )
        return found.digests


def _entries(folder: Path, files: WeightFiles) -> dict[str, Entry]:
    """All tensors; transformers reads every tensor of every shard, whatever the index says."""
    entries: dict[str, Entry] = {}
    for shard in files.shards:
        held = read_header(folder / shard)
        for name in sorted(entries.keys() & held.keys())[:1]:
            raise UserError(
                f"{entries[name].shard} and {shard} both hold `{shown(name, 120)}`: programs take the one or the other",
                where=shown(folder),
                fix="download the checkpoint again; the shards are of different versions",
            )
        entries.update(held)
    if files.weight_map is None:
        return entries
    fix = "download the checkpoint again; the index and the shards are of different versions"
    for name, shard in sorted(files.weight_map.items()):
        if name not in entries or entries[name].shard != shard:
            raise UserError(
                f"the index says that {shard} holds `{shown(name, 120)}`, and it does not",
                where=shown(folder / INDEX),
                fix=fix,
            )
    for name in sorted(entries.keys() - files.weight_map.keys())[:1]:
        raise UserError(
            f"{entries[name].shard} holds `{shown(name, 120)}`, which the index does not name",
            where=shown(folder / INDEX),
            fix=fix,
        )
    return entries


def _require_no_copies(folder: Path, files: WeightFiles, entries: Mapping[str, Entry]) -> None:
    """No file beside the checkpoint holds tensors of the same names: some programs read all files of a folder."""
    for other in others(folder, files):
        try:
            held = read_header(folder / other)
        except UserError:  # nothing that anybody could load
            continue
        for name in sorted(entries.keys() & held.keys())[:1]:
            raise UserError(
                f"{shown(other)} and {entries[name].shard} both hold `{shown(name, 120)}`: it is not clear which is "
                "the model",
                where=shown(folder),
                fix=f"move {shown(other)} out of the folder",
            )
