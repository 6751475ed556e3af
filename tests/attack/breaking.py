"""Model folders broken in one or two places, chosen by a seed: files, configurations, headers, values, tokenizers."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.edits import Choices, edited
from tests.fuzz.targets import CONFIG_KEYS, TOKENIZER_KEYS

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", CONFIG)


def broken(model: Path, folder: Path, seed: int) -> list[str]:
    """Copy `model` to `folder` and break the copy; returns what was done, for messages."""
    generator = random.Random(seed)
    shutil.copytree(model, folder)
    done = []
    for _ in range(generator.choice((1, 1, 1, 2))):
        kind = generator.choice(KINDS)
        try:
            kind(folder, generator)
        except (FileNotFoundError, ValueError, KeyError, IndexError, IsADirectoryError, NotADirectoryError):
            continue  # an earlier break left nothing for this one
        done.append(kind.__name__)
    return done


def config_values(folder: Path, generator: random.Random) -> None:
    """Odd values in config.json."""
    _edit(folder / CONFIG, generator, CONFIG_KEYS)


def side_file_values(folder: Path, generator: random.Random) -> None:
    """Odd values in a tokenizer's or generation's file."""
    _edit(folder / generator.choice(SIDE_FILES[:3]), generator, TOKENIZER_KEYS)


def side_file_bytes(folder: Path, generator: random.Random) -> None:
    """A JSON file cut, or with bytes that are none of its."""
    path = folder / generator.choice(SIDE_FILES)
    content = path.read_bytes()
    at = generator.randrange(len(content))
    path.write_bytes(generator.choice((content[:at], content[:at] + generator.randbytes(8) + content[at:], b"")))


def header_values(folder: Path, generator: random.Random) -> None:
    """Odd values in the safetensors header."""
    header, data = _header(folder / WEIGHTS)
    _save(folder / WEIGHTS, edited(header, Choices(generator.randbytes(40)), ("__metadata__", "extra.weight")), data)


def tensor_changed(folder: Path, generator: random.Random) -> None:
    """A tensor renamed, gone, added, of another dtype of the same size, or of another shape."""
    header, data = _header(folder / WEIGHTS)
    name = generator.choice([key for key in header if key != "__metadata__"])
    how = generator.randrange(5)
    if how == 0:
        header[generator.choice((f"{name}_scale", f"x.{name}", name.replace("0", "7")))] = header.pop(name)
    elif how == 1:
        start, end = header.pop(name)["data_offsets"]
        data = data[:start] + data[end:]
        for value in header.values():
            if "data_offsets" in value and value["data_offsets"][0] >= end:
                value["data_offsets"] = [offset - (end - start) for offset in value["data_offsets"]]
    elif how == 2:
        extra = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
        header[generator.choice(("score.weight", f"{name}_scale", "model.layers.9.mlp.up_proj.weight"))] = extra
        data += b"\0" * 16
    elif how == 3:
        header[name]["dtype"] = generator.choice(("I32", "U32", "F4", "BF16"))
    else:
        header[name]["shape"] = [*header[name]["shape"][::-1], 1]
    _save(folder / WEIGHTS, header, data)


def values_changed(folder: Path, generator: random.Random) -> None:
    """NaN, infinity or the largest float in a tensor."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    at = start + 4 * generator.randrange((len(content) - start) // 4)
    content[at : at + 4] = generator.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"))
    (folder / WEIGHTS).write_bytes(content)


def weights_cut(folder: Path, generator: random.Random) -> None:
    """A file that ended early, or goes on after its end."""
    content = (folder / WEIGHTS).read_bytes()
    cut = content[: generator.randrange(len(content))]
    (folder / WEIGHTS).write_bytes(generator.choice((cut, content + b"more")))


def index_beside(folder: Path, generator: random.Random) -> None:
    """An index: with the single file renamed to a shard, or beside it; whole or with odd values."""
    header, _ = _header(folder / WEIGHTS)
    shard = generator.choice(("model-00001-of-00001.safetensors", "weights.safetensors", WEIGHTS))
    index = {"metadata": {}, "weight_map": {name: shard for name in header if name != "__metadata__"}}
    if generator.random() < 0.7 and shard != WEIGHTS:
        (folder / WEIGHTS).rename(folder / shard)
    if generator.random() < 0.6:
        index = edited(index, Choices(generator.randbytes(40)), ("../up.safetensors", "x"))
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def file_replaced(folder: Path, generator: random.Random) -> None:
    """A file that is a folder, a pipe, a loop, a dangling link, empty, or gone."""
    path = folder / generator.choice((WEIGHTS, *SIDE_FILES))
    path.unlink()
    how = generator.randrange(6)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.symlink_to("/nowhere/at/all")
    elif how == 4:
        path.touch()


def file_added(folder: Path, generator: random.Random) -> None:
    """What other programs leave beside a model."""
    name, content = generator.choice(
        (
            ("adapter_config.json", '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}'),
            ("pytorch_model.bin", "not really"),
            ("evil.py", "raise SystemExit('executed')"),
            ("retrofit.json", "[]"),
            ("retrofit.json", '{"steps": 5}'),
            ("README.md", "---\nlicense: [[[[\n---\n"),
            ("README.md", "---\na: &a [*a]\nlicense: *a\n---\n"),
            ("LICENSE", "\x00" * 1000),
            ("chat_template.jinja", "{% for"),
            ("special_tokens_map.json", "[]"),
            ("added_tokens.json", '{"a": "b"}'),
        )
    )
    (folder / name).write_text(content, encoding="utf-8")


KINDS: tuple[Callable[[Path, random.Random], None], ...] = (
    config_values,
    config_values,
    side_file_values,
    side_file_bytes,
    header_values,
    tensor_changed,
    values_changed,
    weights_cut,
    index_beside,
    file_replaced,
    file_added,
)


def _edit(path: Path, generator: random.Random, more: tuple[str, ...]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edited(values, Choices(generator.randbytes(40)), more)), encoding="utf-8")


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _save(path: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
