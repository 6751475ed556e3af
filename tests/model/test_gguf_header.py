"""Broken GGUF headers and files that contradict themselves: one message each, at once and in little memory."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrofit.errors import UserError
from retrofit.model.gguf_file import read_header
from retrofit.model.source import resolve
from tests.model.test_gguf import write_gguf
from tests.tiny import VOCAB_SIZE

writer = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


def at(position: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Put a number at a place of the file."""
    data = struct.pack("<" + form, value)
    return lambda whole: whole[:position] + data + whole[position + len(data) :]


def value_of(key: str, *data: bytes) -> Callable[[bytes], bytes]:
    """Exchange type and value of a key whose value has as many bytes."""
    new = b"".join(data)

    def change(whole: bytes) -> bytes:
        place = whole.index(key.encode()) + len(key)
        return whole[:place] + new + whole[place + len(new) :]

    return change


def u32(value: int) -> tuple[bytes, bytes]:
    return struct.pack("<I", 4), struct.pack("<I", value)


def entry(name: str, skip: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Put a number `skip` bytes after a tensor's name in the table."""

    def change(whole: bytes) -> bytes:
        place = whole.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + skip
        return at(place, form, value)(whole)

    return change


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "not a GGUF file"),
    "magic": (lambda whole: b"XXXX" + whole[4:], "not a GGUF file"),
    "version": (at(4, "I", 99), "GGUF version 99"),
    "big endian": (lambda whole: whole[:4] + whole[4:8][::-1] + whole[8:], "big-endian"),
    "tensors": (at(8, "Q", 2**60), "holds 1,152,921,504,606,846,976 tensors"),
    "keys": (at(16, "Q", 2**60), "holds 1,152,921,504,606,846,976 keys"),
    "fewer keys": (at(16, "Q", 3), "damaged"),
    "key length": (at(24, "Q", 2**60), "a key has"),
    "key not text": (lambda whole: whole.replace(b"general.license", b"\xff" * 15), "a key is not UTF-8"),
    "key twice": (lambda whole: whole.replace(b"llama.block_count", b"llama.vocab_size\0", 1), "damaged"),
    "value type": (value_of("llama.block_count", struct.pack("<I", 77)), "type 77"),
    "text length": (value_of("general.license", struct.pack("<IQ", 8, 2**62)), "`general.license` has"),
    "list of lists": (value_of("tokenizer.ggml.token_type", struct.pack("<II", 9, 9)), "list of type 9"),
    "list length": (value_of("tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 2**61)), "longer than the file"),
    "half": (lambda whole: whole[: len(whole) // 2], "and the file at"),
    "one byte less": (lambda whole: whole[:-1], "and the file at"),
    "in the header": (lambda whole: whole[:3000], "ends within"),
    "dimensions": (entry("output_norm.weight", 0, "I", 2**31), "dimensions"),
    "no values": (entry("output_norm.weight", 4, "Q", 0), "cannot hold"),
    "huge": (entry("output.weight", 4, "Q", 2**63), "and the file at"),
    "kind": (entry("output_norm.weight", 12, "I", 4), "GGML type 4"),
    "unaligned": (entry("output_norm.weight", 16, "Q", 7), "no multiple of 32"),
    "same place": (entry("output_norm.weight", 16, "Q", 0), "lie at the same place"),
    "beyond": (entry("output_norm.weight", 16, "Q", 2**62), "and the file at"),
    "tensor twice": (lambda whole: whole.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), "given twice"),
    "no heads": (value_of("llama.attention.head_count", *u32(0)), "head_count is 0"),
    "heads": (value_of("llama.attention.head_count_kv", *u32(3)), "cannot share 3"),
    "layers": (value_of("llama.block_count", *u32(10**9)), "block_count is 1,000,000,000"),
    "width": (value_of("llama.embedding_length", *u32(10**9)), "embedding_length is 1000000000"),
    "intermediate": (value_of("llama.feed_forward_length", *u32(10**9)), "every tensor"),
    "context": (value_of("llama.context_length", *u32(2**32 - 1)), "no model can have"),
    "epsilon": (
        value_of("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, float("nan"))),
        "layer_norm_rms_epsilon is nan",
    ),
    "theta": (value_of("llama.rope.freq_base", struct.pack("<If", 6, float("inf"))), "freq_base is inf"),
    "size missing": (lambda whole: whole.replace(b"llama.context_length", b"llama.context_LENGTH"), "is missing"),
    "token type": (
        value_of("tokenizer.ggml.token_type", struct.pack("<IIQi", 9, 5, VOCAB_SIZE, 2**23)),
        "type 8388608",
    ),
    "bos": (value_of("tokenizer.ggml.bos_token_id", *u32(2**31)), "bos_token_id is 2147483648"),
    "merge": (lambda whole: whole.replace(struct.pack("<Q", 3) + b"h e", struct.pack("<Q", 3) + b"h-e"), "`h-e`"),
    "merge of no tokens": (
        lambda whole: whole.replace(struct.pack("<Q", 3) + b"h e", struct.pack("<Q", 3) + b"h i"),
        "`h i`",
    ),
    "a token twice": (
        lambda whole: whole.replace(struct.pack("<Q", 4) + b"<u0>", struct.pack("<Q", 4) + b"</s>"),
        "tokenizer.ggml.eos_token_id = 257 (it reads",
    ),
    "not finite": (lambda whole: whole[:-4] + struct.pack("<f", float("nan")), "not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    change, says = BROKEN[name]
    changed = change(whole)
    assert changed != whole
    (tmp_path / "m.gguf").write_bytes(changed)
    with pytest.raises(UserError, match=re.escape(says)):
        resolve(tmp_path / "m.gguf")
    assert not [path for path in tmp_path.glob("cache/*") if not path.name.startswith(".")]


def test_every_length_of_a_cut_file_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in range(0, 6000, 61):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_header(path)


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({"split.count": 3}, {}, "llama-gguf-split --merge m.gguf whole.gguf"),
        ({"general.type": "adapter"}, {}, r"no language model \(adapter\)"),
        ({}, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "every tensor"),
        ({"llama.attention.key_length": 32}, {}, r"key_length = 32 \(it reads 16|every tensor"),
    ],
)
def test_what_transformers_would_read_as_another_model(
    metadata: dict[str, Any], tensors: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(UserError, match=says):
        resolve(path, weights=False)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"\x00" * 100])
def test_a_piece_of_a_file_names_what_joins_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m-00002-of-00003.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"llama-gguf-split --merge m-00001-of-00003.gguf whole.gguf"):
        resolve(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [("pipe.gguf", "is a pipe"), ("loop", "loop"), ("dangling.gguf", "links to nowhere"), ("absent.GGUF", "no such")],
)
def test_what_is_no_file(name: str, says: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling.gguf").symlink_to("nowhere")
    with pytest.raises(UserError, match=says):
        resolve(tmp_path / name)
