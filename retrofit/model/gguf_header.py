"""The header of a GGUF file: metadata and a table of tensors, every length checked against the file before it is read.

The readers of the `gguf` package and of transformers believe what a file says of itself; a file comes to them only
after this module has read it to its end. Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.install import install_command

MAX_HEADER_BYTES = 256 << 20
"""Longest header. That of a model with half a million merges has 20 MB."""
MAX_ELEMENTS = 1 << 21
"""Most elements of all arrays together. A vocabulary of 262,144 tokens and its merges have 1.3 million."""
MAX_ENTRIES = 1 << 16
"""Most keys, and most tensors."""
MAX_NAME = 1 << 12
MAX_DIMENSIONS = 4

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class StoredTensor:
    """kind: its GGML type, for example "Q4_1". shape: numbers of values, innermost (row length) first, as GGUF has it.
    start, nbytes: where its data lie in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """metadata: by key, in the file's order. tensors: by name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read(path: Path, kinds: dict[int, tuple[str, int, int]]) -> Header:
    """Read the header of a regular file.

    kinds: {number of a GGML type: its name, values of a block, bytes of a block}. Raises UserError for everything that
    is not a whole GGUF file of version 2 or 3 in little-endian order.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, os.fstat(file.fileno()).st_size, kinds).header()
    except _DamagedError as error:
        raise UserError(
            f"the GGUF file is truncated or damaged: {error}", where=shown(path), fix="download it again"
        ) from None
    except _OtherError as error:
        raise UserError(error.what, where=shown(path), fix=error.fix) from None


class _DamagedError(Exception):
    """What the bytes cannot mean."""


class _OtherError(Exception):
    """What the bytes do mean, and is not read."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


class _Reader:
    def __init__(self, file: BinaryIO, size: int, kinds: dict[int, tuple[str, int, int]]) -> None:
        self.file = file
        self.size = size
        self.kinds = kinds
        self.at = 0
        self.elements = 0

    def header(self) -> Header:
        """Metadata and tensors of the whole file."""
        if self.take(4, "its first bytes") != b"GGUF":
            raise _OtherError("the file is not a GGUF file", "check the download")
        version = self.number("I")
        if version not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
                raise _OtherError(
                    "the GGUF file is in big-endian order, which is not read",
                    "convert it with gguf-convert-endian of the `gguf` package, or give the little-endian file",
                )
            raise _OtherError(
                f"GGUF version {version} is not read", "give a file of version 2 or 3, or the safetensors checkpoint"
            )
        tensor_count, key_count = self.number("Q"), self.number("Q")
        self.require_room(key_count, 13, "keys")
        self.require_room(tensor_count, 24, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.text("a key", MAX_NAME)
            if key in metadata:
                raise _DamagedError(f"the key `{shown(key, 60)}` is given twice")
            metadata[key] = self.value(self.number("I"), key)
        table = [self.entry() for _ in range(tensor_count)]
        return Header(metadata, self.placed(table, self.alignment(metadata)))

    def require_room(self, count: int, least: int, what: str) -> None:
        if count > MAX_ENTRIES or count * least > self.size - self.at:
            raise _DamagedError(f"it says that it holds {count:,} {what}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise _DamagedError(f"it ends within {what}")
        if self.at + count > MAX_HEADER_BYTES:
            raise _DamagedError(f"its header is longer than {MAX_HEADER_BYTES >> 20} MB")
        data = self.file.read(count)
        if len(data) < count:
            raise _DamagedError(f"it ends within {what}")
        self.at += count
        return data

    def number(self, form: str) -> Any:
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize("<" + form), "its header"))
        return value

    def text(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q")
        if length > limit:
            raise _DamagedError(f"{what} has {length:,} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise _DamagedError(f"{what} is not UTF-8 text") from None

    def value(self, kind: int, key: str) -> Any:
        what = f"the value of `{shown(key, 60)}`"
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _NUMBERS:
            raise _DamagedError(f"{what} is of type {kind}, which there is not")
        return self.numbers(kind, 1, what)[0]

    def array(self, what: str) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        least = 8 if kind == _STRING else struct.calcsize("<" + _NUMBERS.get(kind, "B"))
        if kind != _STRING and kind not in _NUMBERS:
            raise _DamagedError(f"{what} is a list of type {kind}, which there is not")
        if count * least > self.size - self.at:
            raise _DamagedError(f"{what} is a list of {count:,}, longer than the file")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise _DamagedError(f"its lists hold more than {MAX_ELEMENTS:,} values")
        return [self.text(what) for _ in range(count)] if kind == _STRING else self.numbers(kind, count, what)

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        form = _NUMBERS[kind]
        data = self.take(count * struct.calcsize("<" + form), what)
        if kind == _BOOL and not set(data) <= {0, 1}:
            raise _DamagedError(f"{what} is neither true nor false")
        return list(struct.unpack(f"<{count}{form}", data))

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """A row of the table: name, shape, number of the type, offset from the start of the data."""
        name = self.text("the name of a tensor", MAX_NAME)
        dimensions = self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _DamagedError(f"`{shown(name, 60)}` has {dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape, self.number("I"), self.number("Q")

    @staticmethod
    def alignment(metadata: dict[str, Any]) -> int:
        value = metadata.get(_ALIGNMENT, 32)
        if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
            raise _DamagedError(f"{_ALIGNMENT} is {shown(value, 40)}, not a power of two from 8")
        return value

    def placed(self, table: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, StoredTensor]:
        """The tensors of the table, each with data of its own that lie within the file."""
        data = -(-self.at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, number, offset in table:
            quoted = f"`{shown(name, 60)}`"
            if name in tensors:
                raise _DamagedError(f"the tensor {quoted} is given twice")
            if number not in self.kinds:
                raise _OtherError(
                    f"{quoted} is stored as GGML type {number}, which the package `gguf` does not know",
                    f"update it: {install_command('-U', 'gguf')}; or give the safetensors checkpoint of this model",
                )
            kind, values, nbytes = self.kinds[number]
            if not all(shape) or shape[0] % values:
                raise _DamagedError(f"{quoted} has the shape {shape}, which {kind} cannot hold")
            if offset % alignment:
                raise _DamagedError(f"{quoted} begins at {offset:,}, which is no multiple of {alignment}")
            tensors[name] = StoredTensor(kind, shape, data + offset, math.prod(shape) // values * nbytes)
        end, before = data, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise _DamagedError(f"`{shown(before, 60)}` and `{shown(name, 60)}` lie at the same place")
            end, before = tensor.start + tensor.nbytes, name
        if end > self.size:
            raise _DamagedError(f"`{shown(before, 60)}` ends at byte {end:,}, and the file at {self.size:,}")
        return tensors
