"""Checkpoint folders: what is read equals what safetensors reads; every broken folder is refused by name."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoint.files import INDEX, SINGLE
from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (8, 4), "a.bias": (8,), "b.weight": (3, 5, 2), "scalar": (), "empty": (0, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def single(folder: Path, values: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(values, folder / SINGLE, metadata={"format": "pt"})
    return folder


def sharded(folder: Path, values: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = sorted(values)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:])):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: values[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [single, sharded])
def test_reads_what_safetensors_reads(tmp_path: Path, layout, dtype: torch.dtype) -> None:
    values = tensors(dtype)
    checkpoint = Checkpoint.open(layout(tmp_path / "m", values))
    assert set(checkpoint.names) == set(values)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.nbytes == sum(t.nbytes for t in values.values())
    for name, value in values.items():
        assert checkpoint.shape(name) == tuple(value.shape)
        assert checkpoint.dtype(name) == dtype
        assert torch.equal(checkpoint.tensor(name), value)
        reference = load_file(checkpoint.folder / checkpoint.shard_of(name))[name]
        assert torch.equal(checkpoint.tensor(name), reference)


def test_a_tensor_is_a_copy(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m", tensors()))
    before = (checkpoint.folder / SINGLE).read_bytes()
    checkpoint.tensor("a.weight").zero_()
    assert (checkpoint.folder / SINGLE).read_bytes() == before
    assert checkpoint.tensor("a.weight").abs().sum() > 0


def test_names_come_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path / "m", tensors()))
    places = [(checkpoint.entries[n].shard, checkpoint.entries[n].offset) for n in checkpoint.names]
    assert places == sorted(places)


@pytest.mark.parametrize("cut", [4, 20, -1])
def test_truncated_single_file(tmp_path: Path, cut: int) -> None:
    folder = single(tmp_path / "m", tensors())
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:cut])
    with pytest.raises(UserError, match="truncated or corrupt") as caught:
        Checkpoint.open(folder)
    assert SINGLE in str(caught.value)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is truncated"):
        Checkpoint.open(folder)


def test_file_longer_than_its_header_says(tmp_path: Path) -> None:
    folder = single(tmp_path / "m", tensors())
    with (folder / SINGLE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="4 more than"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}',
    ],
)
def test_corrupt_headers(tmp_path: Path, header: bytes) -> None:
    folder = single(tmp_path / "m", tensors())
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or corrupt"):
        Checkpoint.open(folder)


def test_unknown_dtype(tmp_path: Path) -> None:
    folder = single(tmp_path / "m", tensors())
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(UserError, match="`a` has dtype F4"):
        Checkpoint.open(folder)


def test_lfs_pointer(tmp_path: Path) -> None:
    folder = single(tmp_path / "m", tensors())
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match="LFS pointer"):
        Checkpoint.open(folder)


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors"):
        Checkpoint.open(folder)


def test_index_names_a_missing_tensor(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="`ghost`"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("shard", ["../../etc/passwd", "pytorch_model.bin", "/tmp/x.safetensors"])
def test_index_may_not_leave_the_folder(tmp_path: Path, shard: str) -> None:
    folder = sharded(tmp_path / "m", tensors())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match="not a safetensors file of this folder"):
        Checkpoint.open(folder)


def test_index_without_map(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    (folder / INDEX).write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        Checkpoint.open(folder)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = single(tmp_path / "m", tensors())
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle") as caught:
        Checkpoint.open(folder)
    assert "pytorch_model.bin" in str(caught.value)


def test_adapter_and_empty_folders(tmp_path: Path) -> None:
    folder = single(tmp_path / "m", tensors())
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter"):
        Checkpoint.open(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors"):
        Checkpoint.open(folder)


def test_config_is_needed(tmp_path: Path) -> None:
    folder = single(tmp_path / "m", tensors())
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"needs config\.json"):
        Checkpoint.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_require_finite_names_the_tensor(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    values = tensors(dtype)
    values["tokens"] = torch.arange(4)
    Checkpoint.open(single(tmp_path / "good", values)).require_finite()
    values["b.weight"][1, 2, 0] = bad
    checkpoint = Checkpoint.open(single(tmp_path / "bad", values))
    with pytest.raises(UserError, match=r"`b.weight` holds 1 values") as caught:
        checkpoint.require_finite()
    assert SINGLE in str(caught.value)
    checkpoint.require_finite(["a.weight", "a.bias"])


def test_require_finite_looks_at_the_dtype_that_will_be_written(tmp_path: Path) -> None:
    values = tensors(torch.float32)
    values["b.weight"][1, 2, 0] = 65_519.0  # rounds to the largest float16
    checkpoint = Checkpoint.open(single(tmp_path / "good", values))
    checkpoint.require_finite(written=torch.float16)
    values["b.weight"][1, 2, 0] = -65_520.0
    checkpoint = Checkpoint.open(single(tmp_path / "large", values))
    checkpoint.require_finite(written=torch.bfloat16)
    with pytest.raises(UserError, match=r"`b.weight` has values beyond the largest float16") as caught:
        checkpoint.require_finite(written=torch.float16)
    assert SINGLE in str(caught.value.where)
    assert "bfloat16 or float32" in str(caught.value.fix)
