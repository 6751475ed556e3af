"""Shards: stock safetensors and transformers read them; the bytes depend on the inputs alone."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retrofit.checkpoint.files import INDEX, SINGLE
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.side_files import copy_side_files
from retrofit.checkpoint.write import ShardWriter, parse_size, remove_shards, write_config
from retrofit.errors import UserError


def values(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layers.{i}.weight": torch.randn(16, 8, generator=generator) for i in range(count)}


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings) -> tuple[str, ...]:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with ShardWriter(folder, **settings) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tuple(sorted(path.name for path in folder.glob("*.safetensors")))


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", ["5GB", "1KB", 1])
def test_written_tensors_are_read_by_safetensors(tmp_path: Path, dtype: torch.dtype, size: str | int) -> None:
    tensors = {name: t.to(dtype) for name, t in values().items()}
    shards = write(tmp_path / "m", tensors, max_shard_size=size)
    found = read(tmp_path / "m")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert Checkpoint.open(tmp_path / "m").shards == shards
    if size == "5GB":
        assert shards == (SINGLE,)
        assert not (tmp_path / "m" / INDEX).exists()
    else:
        per_shard = max(1, parse_size(size) // tensors["layers.0.weight"].nbytes)
        assert len(shards) == -(-len(tensors) // per_shard)
        index = json.loads((tmp_path / "m" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"].values()) == set(shards)
    assert not list((tmp_path / "m").glob(".shard*"))


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, values(), max_shard_size="1KB")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_header_longer_than_its_room_moves_the_data(tmp_path: Path) -> None:
    tensors = values(40)
    write(tmp_path / "m", tensors, header_reserve=64)
    found = read(tmp_path / "m")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    Checkpoint.open(tmp_path / "m").require_finite()


def test_every_name_is_written_of_tensors_that_share_memory_as_well(tmp_path: Path) -> None:
    matrix = torch.arange(16.0).reshape(4, 4)
    folder = tmp_path / "m"
    folder.mkdir()
    with ShardWriter(folder) as writer:
        writer.add("head", matrix)
        writer.add("embed", matrix)
        writer.add("transposed", matrix.T)
    found = read(folder)
    assert found.keys() == {"head", "embed", "transposed"}
    assert torch.equal(found["embed"], matrix)
    assert torch.equal(found["transposed"], matrix.T)


def test_a_tensor_that_would_lie_misaligned_begins_a_shard(tmp_path: Path) -> None:
    tensors = {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(4)}
    shards = write(tmp_path / "m", tensors)
    assert len(shards) == 2
    assert torch.equal(read(tmp_path / "m")["wide"], torch.ones(4))


def test_views_are_written_dense(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    write(tmp_path / "m", {"t": base.T, "part": base[1:3, 2:4], "scalar": torch.tensor(2.0), "none": torch.ones(0, 3)})
    found = read(tmp_path / "m")
    assert torch.equal(found["t"], base.T)
    assert torch.equal(found["part"], base[1:3, 2:4])
    assert found["scalar"] == 2
    assert found["none"].shape == (0, 3)


def test_copied_bytes(tmp_path: Path) -> None:
    write(tmp_path / "source", values())
    source = Checkpoint.open(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    with ShardWriter(out) as writer, FileIO(source.folder / SINGLE) as file:
        for name in source.names:
            entry = source.entries[name]
            writer.copy(name, entry.dtype, entry.shape, file, entry.offset, entry.nbytes)
    found = read(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in values().items())


def test_copy_without_the_kernel_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.copy_file_range", raising=False)
    test_copied_bytes(tmp_path)


def test_a_writer_that_is_gone_on_from_needs_no_fdatasync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fdatasync", raising=False)  # as on macOS
    write(tmp_path / "out", values(), resume=True)
    assert set(read(tmp_path / "out")) == set(values())


@pytest.mark.parametrize("size", [64, "5GB"])
def test_what_a_writer_left_is_removed_and_nothing_else(size: int | str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shards = write(folder, values(), max_shard_size=size)
    (folder / ".shard-00099").write_bytes(b"torn")
    assert remove_shards(folder) == len(shards) + 1
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert remove_shards(folder) == 0


def test_writer_refuses_names_twice_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already written"), ShardWriter(tmp_path) as writer:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="no tensor"):
        ShardWriter(tmp_path).close()


def test_sizes() -> None:
    assert [parse_size(s) for s in ("5GB", "1.5 mb", "20", 7)] == [5_000_000_000, 1_500_000, 20, 7]
    for bad in ("5 apples", "", "-1GB", "0"):
        with pytest.raises(UserError, match="not a size"):
            parse_size(bad)


def test_side_files_carry_no_weights_code_or_card(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    out.mkdir()
    wanted = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    for name in [*wanted, "config.json", "README.md", "modeling_x.py", "model.safetensors", "pytorch_model.bin"]:
        (source / name).write_text(name)
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    copied = copy_side_files(source, out)
    assert copied == tuple(sorted([*wanted, "additional_chat_templates/rag.jinja"]))
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == set(copied)


@pytest.mark.parametrize("name", ["LICENSE", "additional_chat_templates/x.jinja", "additional_chat_templates"])
def test_no_file_of_somebody_is_copied_through_a_link(name: str, tmp_path: Path) -> None:
    model, secret, out = tmp_path / "model", tmp_path / "secret", tmp_path / "out"
    for folder in (model, secret, out):
        folder.mkdir()
    (secret / "key.jinja").write_text("key")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(secret / "key.jinja" if "." in name or name == "LICENSE" else secret)
    with pytest.raises(UserError, match="which is no file of the model"):
        copy_side_files(model, out)
    assert not list(out.iterdir())


def test_links_to_files_of_a_model_are_followed(tmp_path: Path) -> None:
    model, store, out = tmp_path / "model", tmp_path / "store", tmp_path / "out"
    for folder in (model, store, out):
        folder.mkdir()
    for name in ("tokenizer.json", "0123456789abcdef" * 4):
        (store / name).write_text(name)
    (model / "license.old").write_text("mine")
    (model / "tokenizer.json").symlink_to(store / "tokenizer.json")
    (model / "vocab.json").symlink_to(store / ("0123456789abcdef" * 4))
    (model / "LICENSE").symlink_to("license.old")
    assert copy_side_files(model, out) == ("LICENSE", "tokenizer.json", "vocab.json")
    assert not any(path.is_symlink() for path in out.iterdir())


def test_config_of_a_class_states_what_the_attention_reads(tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaConfig

    config = LlamaConfig(num_key_value_heads=32, architectures=["LlamaForCausalLM"], _name_or_path="/home/me/model")
    write_config(tmp_path, config, torch.bfloat16)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["num_key_value_heads"] == 32
    assert stored["num_attention_heads"] == 32
    assert stored["rope_parameters"]["rope_theta"] == 10000.0
    assert stored["dtype"] == "bfloat16"
    assert stored["architectures"] == ["LlamaForCausalLM"]
    assert "_name_or_path" not in stored
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["rope_parameters"] == config.rope_parameters


def test_config_of_a_mapping_stays(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "x", "torch_dtype": "float32", "auto_map": {"a": "b"}}, "bfloat16")
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "x", "dtype": "bfloat16"}
