"""One pass over the bytes of weight files: the extremes of every tensor, and the digests of the files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from retrofit.checkpoint.header import Entry
from retrofit.checkpoint.threads import each_alone
from retrofit.errors import UserError
from retrofit.escape import shown

PIECE_BYTES = 4 << 20  # read, hashed and compared while it is in the processor's cache
RUN_BYTES = 256 << 20  # of one thread's turn


@dataclass(frozen=True)
class Scan:
    """extremes: (lowest, highest) value [2] of every floating tensor that was asked for, in its own dtype (float32 for
    8 bits), NaN where one is among them. digests: SHA-256 by file name."""

    extremes: Mapping[str, Tensor]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class _Run:
    """Tensors of one file, one after another. whole: the file is hashed from its first byte to its last."""

    path: Path
    tensors: tuple[tuple[str, Entry], ...]
    whole: bool


def scan(
    folder: Path,
    entries: Mapping[str, Entry],
    dtypes: Mapping[str, torch.dtype],
    names: Collection[str],
    digested: Collection[str] = (),
) -> Scan:
    """Read the tensors `names` once, by several threads, in memory of a few MiB each.

    dtypes: by the names of safetensors. digested: files (of those that hold the tensors) that are hashed on the way,
    whole, each by one thread.

    Raises: UserError where a file became shorter.
    """
    runs = _runs(folder, entries, names, digested)

    def read(run: _Run) -> tuple[dict[str, Tensor], str | None]:
        return _read(run, dtypes, frozenset(names))

    extremes: dict[str, list[Tensor]] = {}
    digests = {}
    for run, (found, digest) in zip(runs, each_alone(read, runs), strict=True):
        for name, pair in found.items():
            extremes.setdefault(name, []).append(pair)
        if digest is not None:
            digests[run.path.name] = digest
    return Scan({name: _merged(pairs) for name, pairs in extremes.items()}, digests)


def _merged(pairs: list[Tensor]) -> Tensor:
    return torch.stack(torch.aminmax(torch.cat(pairs)))  # a NaN stays one, which Python's min would lose


def _runs(folder: Path, entries: Mapping[str, Entry], names: Collection[str], digested: Collection[str]) -> list[_Run]:
    runs = []
    asked = frozenset(names)
    for shard in sorted({entry.shard for entry in entries.values()}):
        held = sorted(((name, one) for name, one in entries.items() if one.shard == shard), key=lambda x: x[1].offset)
        if shard in digested:
            runs.append(_Run(folder / shard, tuple(held), whole=True))
            continue
        run: list[tuple[str, Entry]] = []
        for name, entry in held:
            if name not in asked:
                continue
            if run and sum(one.nbytes for _, one in run) + entry.nbytes > RUN_BYTES:
                runs.append(_Run(folder / shard, tuple(run), whole=False))
                run = []
            run.append((name, entry))
        if run:
            runs.append(_Run(folder / shard, tuple(run), whole=False))
    return sorted(runs, key=lambda run: -sum(entry.nbytes for _, entry in run.tensors))  # the longest first


def _read(run: _Run, dtypes: Mapping[str, torch.dtype], names: frozenset[str]) -> tuple[dict[str, Tensor], str | None]:
    buffer, digest = torch.empty(PIECE_BYTES, dtype=torch.uint8), hashlib.sha256() if run.whole else None
    found = {}
    with FileIO(run.path) as file:
        at = 0
        for name, entry in run.tensors:
            if digest is None:
                file.seek(entry.offset)
            else:
                _pieces(file, entry.offset - at, buffer, digest, None, f"{shown(run.path)}: {shown(name, 120)}")
            dtype = dtypes[entry.dtype]
            compared = dtype if name in names and dtype.is_floating_point and entry.nbytes else None
            pairs = _pieces(file, entry.nbytes, buffer, digest, compared, f"{shown(run.path)}: {shown(name, 120)}")
            at = entry.offset + entry.nbytes
            if pairs:
                found[name] = _merged(pairs)
        if digest is not None:
            while count := file.readinto(buffer.numpy().data):
                digest.update(buffer.numpy().data[:count])
    return found, None if digest is None else digest.hexdigest()


def _pieces(
    file: FileIO,
    nbytes: int,
    buffer: Tensor,
    digest: hashlib._Hash | None,
    dtype: torch.dtype | None,
    where: str,
) -> list[Tensor]:
    """Extremes of the next bytes of a file as numbers of `dtype`, piece by piece; nothing without one."""
    view, pairs = buffer.numpy().data, []
    while nbytes:
        size = done = min(PIECE_BYTES, nbytes)
        while done:
            count = file.readinto(view[size - done : size])
            if not count:
                raise UserError("the file became shorter while it was read", where=where)
            done -= count
        if digest is not None:
            digest.update(view[:size])
        if dtype is not None:
            values = buffer[:size].view(dtype)
            pairs.append(torch.stack(torch.aminmax(values.float() if dtype.itemsize == 1 else values)))
        nbytes -= size
    return pairs
