"""Headers of safetensors files: whatever the bytes are, what is read is what the reference reads, or is refused."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from retrofit.checkpoint.header import ITEM_BYTES, MAX_HEADER_BYTES, Entry, read_header
from retrofit.checkpoint.read import DTYPES
from retrofit.errors import UserError

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [0, 7], "data_offsets": [32, 32]},
    "d": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
DATA = bytes(range(40))


def file_of(folder: Path, header: bytes | dict[str, Any], data: bytes = DATA) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def by_reference(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def described(entries: dict[str, Entry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}


def test_item_sizes_are_those_of_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES


def test_a_good_header(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD)
    entries = read_header(path)
    start = path.stat().st_size - len(DATA)
    assert described(entries) == by_reference(path)
    assert [entry.offset - start for entry in entries.values()] == [0, 24, 32, 32]
    assert [entry.nbytes for entry in entries.values()] == [24, 8, 0, 8]


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
        b"null",
        b"\xff\xfe{{{{",
        json.dumps(GOOD).encode("utf-16"),
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        json.dumps(GOOD)[:-1].encode() + b',"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}',
        json.dumps({**GOOD, "\ud800": GOOD["c"]}).encode(),
        {**GOOD, "__metadata__": {"format": 1}},
        {**GOOD, "__metadata__": []},
        {"b": {"dtype": "F32", "shape": [2, 3]}},
        {"b": [1]},
        changed("b", more=1),
        changed("b", shape=[4.0]),
        changed("b", shape=[float("nan")]),
        changed("b", shape=[float("inf")]),
        changed("b", shape=[True, 4]),
        changed("b", shape="4"),
        changed("b", shape=None),
        changed("b", shape=[-2, -2]),
        changed("b", shape=[2**70, 0]),
        changed("b", shape=[10**12, 10**12]),
        changed("b", shape=[2**62, 4]),
        changed("b", shape=[5]),
        changed("b", shape=[4] + [1] * 64),
        changed("b", data_offsets=[24, 32, 40]),
        changed("b", data_offsets=[24]),
        changed("b", data_offsets=[32, 24]),
        changed("b", data_offsets=["24", "32"]),
        changed("b", data_offsets=[24.0, 32.0]),
        changed("b", data_offsets=[-8, 0]),
        changed("b", data_offsets=[10**12, 10**12 + 8]),
        changed("b", data_offsets=[0, 8]),
        changed("b", dtype="F4"),
        changed("b", dtype="F32"),
        changed("b", dtype=["BF16"]),
        changed("b", dtype={}),
    ],
)
def test_what_is_no_header_is_refused(tmp_path: Path, header: bytes | dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        read_header(file_of(tmp_path, header))
    assert "model.safetensors" in str(caught.value)
    assert caught.value.fix
    assert len(str(caught.value)) < 1500


def test_a_message_shows_no_control_characters_and_no_megabytes(tmp_path: Path) -> None:
    name = "\x1b[31m" + "x" * 1_000_000
    with pytest.raises(UserError) as caught:
        read_header(file_of(tmp_path, {name: {"dtype": "F4", "shape": [], "data_offsets": [0, 1]}}))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_unusual_names_are_names(tmp_path: Path) -> None:
    names = ["../../x", "x" * 1_000_000, "\x00\n", "é", ""]
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    path = file_of(tmp_path, header, DATA[: len(names)])
    assert list(read_header(path)) == names
    assert described(read_header(path)) == by_reference(path)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, 4 * MAX_HEADER_BYTES)
    with pytest.raises(UserError, match="are not read"):
        read_header(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("nowhere"), "links to nowhere, which is not there"),
        (lambda path: path.symlink_to(path.name), "is a loop of symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
        (os.mkfifo, "is a pipe, not a file"),
        (lambda path: None, "is missing"),
        (lambda path: path.write_bytes(b""), "is truncated or corrupt"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2**63) + b"{}" * 50), "is truncated or corrupt"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, make: Any, said: str) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(UserError, match=f"model.safetensors {said}"):
        read_header(path)


def test_any_bytes_are_refused_or_read_as_the_reference_reads_them(tmp_path: Path) -> None:
    """Seeded: bytes changed, removed, doubled, and numbers and names exchanged."""
    chance = random.Random(0)
    parts = [b"-1", b"0", b"1e1", b"4.0", b"18446744073709551616", b"null", b'"F32"', b'"\\u0000"', b"[]", b"{}", b","]
    good = file_of(tmp_path, GOOD).read_bytes()
    accepted = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 4))):
            at = chance.randrange(len(data) + 1)
            width = chance.choice((0, 1, 1, 2, 8))
            new = chance.choice((b"", bytes([chance.randrange(256)]), chance.choice(parts), bytes(data[at : at + 9])))
            data[at : at + width] = new
        path = tmp_path / "fuzzed.safetensors"
        path.write_bytes(data)
        try:
            found = read_header(path)
        except UserError:
            continue
        accepted += 1
        try:
            assert described(found) == by_reference(path)
        except SafetensorError as error:
            pytest.fail(f"accepted what the reference refuses ({error}): {bytes(data)!r}")
    assert accepted > 5


def test_torch_reads_every_dtype(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        header = {"a": {"dtype": name, "shape": [3], "data_offsets": [0, 3 * dtype.itemsize]}}
        path = file_of(tmp_path, header, bytes(3 * dtype.itemsize))
        with safe_open(path, framework="pt") as file:
            assert file.get_tensor("a").dtype == dtype
        assert torch.zeros(3, dtype=dtype).nbytes == read_header(path)["a"].nbytes
