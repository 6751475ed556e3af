"""The header of a safetensors file: what it holds, checked against the file's length. No tensor is read.

8 bytes with the length of the header (little-endian), the header in JSON, then the tensors one after the other:
https://huggingface.co/docs/safetensors#format. Whatever bytes a file has, `read_header` gives what it holds or a
UserError; nothing is accepted that the reference reader refuses, or could take for something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import parse_json, require_regular

MAX_HEADER_BYTES = 32 << 20
"""Largest header that is read: a quarter of a million tensors in one file, more than any checkpoint has."""
MAX_DIMS = 64
"""Most dimensions of a tensor, as in PyTorch."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of a value in each dtype that is read."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST = 2**63 - 1
_SHOWN = 120  # characters of a tensor's name in a message


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: where its bytes are. `offset` counts from the start of the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises UserError when the file is truncated or its header is broken."""
    require_regular(path, missing=f"{shown(path.name)} is missing", fix="download the file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise UserError(
                f"{shown(path.name)} is a Git LFS pointer, not the weights",
                where=shown(path),
                fix="run `git lfs pull` there",
            )
        if len(start) < 8:
            raise _broken(path, "it is empty" if size == 0 else f"it has {size} bytes, fewer than any header")
        if 8 + length > size:
            raise _broken(path, f"its header says {length} bytes and the file has {size}")
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"its header says {length} bytes, and more than {MAX_HEADER_BYTES} are not read")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _broken(path, "its header is not UTF-8 text") from None
    header = parse_json(
        text,
        f"{shown(path.name)} is truncated or corrupt: its header",
        where=shown(path),
        fix=f"download {shown(path.name)} again",
    )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its __metadata__ must hold texts by name")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    """start: where the data begins in the file."""
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise _broken(path, f"`{shown(name, _SHOWN)}` must have a dtype, a shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(shape) > MAX_DIMS or len(offsets) != 2:
        raise _broken(path, f"the shape or the place of `{shown(name, _SHOWN)}` is not given in whole numbers")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError(
            f"`{shown(name, _SHOWN)}` has dtype {shown(dtype, 20)}, which is not supported",
            where=shown(path),
            fix="use a checkpoint in float32, bfloat16 or float16",
        )
    values = 1
    for n in shape:
        values *= n
        if values > _MOST:
            raise _broken(path, f"`{shown(name, _SHOWN)}` has more values than any file holds")
    begin, end = offsets
    if end - begin != values * ITEM_BYTES[dtype]:
        raise _broken(path, f"the place of `{shown(name, _SHOWN)}` does not fit its shape {shown(shape, _SHOWN)}")
    return Entry(path.name, dtype, tuple(shape), start + begin, end - begin)


def _counts(value: object) -> bool:
    """Whether this is a list of whole numbers that are not negative; True is none."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MOST for n in value)


def _check_layout(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors lie one after the other and fill the file exactly."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise _broken(path, f"`{shown(name, _SHOWN)}` does not begin where the tensor before it ends")
        end += entry.nbytes
    if size < end:
        raise _broken(path, f"it has {size} bytes and its header promises {end}")
    if size > end:
        raise _broken(path, f"it has {size} bytes, {size - end} more than its header promises")


def _broken(path: Path, why: str) -> UserError:
    name = shown(path.name)
    return UserError(f"{name} is truncated or corrupt: {why}", where=shown(path), fix=f"download {name} again")
