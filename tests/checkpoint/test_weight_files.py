"""Which files are the checkpoint: what programs would read differently is refused, and the files are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retrofit.checkpoint.files import INDEX, SINGLE, checkpoint_files, holds_weights, weight_files
from retrofit.checkpoint.provenance import digest
from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(path: Path, *names: str) -> None:
    save_file({name: torch.ones(2) for name in names}, path, metadata={"format": "pt"})


def single(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save(folder / SINGLE, "a", "b")
    return folder


def sharded(folder: Path, first: str = FIRST, second: str = SECOND) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save(folder / first, "a")
    save(folder / second, "b")
    index(folder, {"a": first, "b": second})
    return folder


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("first", [FIRST, "pytorch_model-1.safetensors", "ä [1] {x}.safetensors"])
def test_shards_may_have_any_name(tmp_path: Path, first: str) -> None:
    folder = sharded(tmp_path / "m", first)
    assert weight_files(folder).names == tuple(sorted((first, SECOND, INDEX)))
    assert Checkpoint.open(folder).shards == tuple(sorted((first, SECOND)))
    assert set(digest(folder)) == {"config.json", first, SECOND, INDEX}


def test_an_index_of_the_single_file_alone_agrees_with_it(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    index(folder, {"a": SINGLE, "b": SINGLE})
    assert weight_files(folder).names == (SINGLE, INDEX)


def folder_of(files: dict[str, str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("start", "change", "named"),
    [
        (single, folder_of({"adapter_config.json": "{}"}), ["adapter_config.json", "transformers applies it"]),
        (single, folder_of({"adapter_model.safetensors": "x"}), ["adapter_model.safetensors"]),
        (sharded, folder_of({"adapter_model.bin": "", "adapter_config.json": ""}), ["adapter_model.bin"]),
        (sharded, lambda f: save(f / SINGLE, "a", "b"), [SINGLE, INDEX]),
        (single, lambda f: index(f, {"a": FIRST}), [SINGLE, INDEX]),
        (single, lambda f: save(f / FIRST, "c"), [FIRST]),
        (sharded, lambda f: save(f / "model-00003-of-00003.safetensors", "c"), ["model-00003-of-00003.safetensors"]),
        (single, lambda f: save(f / "shard-00000-model-00001-of-00001.safetensors", "c"), ["every safetensors file"]),
        (single, lambda f: save(f / "old.safetensors", "b"), ["old.safetensors", SINGLE, "`b`"]),
        (sharded, lambda f: save(f / FIRST, "a", "b"), [FIRST, SECOND, "`b`"]),
        (sharded, lambda f: save(f / FIRST, "a", "c"), [FIRST, "`c`", INDEX]),
        (sharded, lambda f: index(f, {"a": SECOND, "b": FIRST}), ["`a`", INDEX]),
        (sharded, lambda f: (f / SECOND).unlink(), [SECOND, INDEX, "`b`"]),
        (sharded, lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()), [SECOND, "is a folder"]),
        (sharded, lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to(SECOND)), [SECOND, "loop"]),
        (sharded, lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to("gone")), [SECOND, "gone"]),
        (single, lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()), [SINGLE, "is a folder"]),
        (single, lambda f: (f / SINGLE).rename(f / "consolidated.safetensors"), ["only consolidated.safetensors"]),
        (single, folder_of({"config.json": '{"transformers_weights": "other.safetensors"}'}), ["other.safetensors"]),
    ],
)
def test_what_programs_would_read_differently_is_refused(
    tmp_path: Path, start: Callable[[Path], Path], change: Callable[[Path], object], named: list[str]
) -> None:
    folder = start(tmp_path / "m")
    change(folder)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder)
    for words in named:
        assert words in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "._model-00001-of-00002.safetensors",
        "speculator.safetensors",
        "pytorch_model.bin",
        "original",
    ],
)
def test_copies_that_transformers_does_not_read_are_left_alone(tmp_path: Path, name: str) -> None:
    folder = single(tmp_path / "m")
    before = digest(folder)
    if name == "original":
        shutil.copytree(folder, folder / name)
    elif name == "speculator.safetensors":
        save(folder / name, "other")
    else:
        shutil.copyfile(folder / SINGLE, folder / name)
    assert Checkpoint.open(folder).files.names == (SINGLE,)
    assert digest(folder) == before


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"metadata": {}, "weight_map": null}',
        '{"metadata": {}, "weight_map": []}',
        '{"metadata": {}, "weight_map": {}}',
        '{"metadata": {}, "weight_map": {"a": 5}}',
        '{"metadata": {}, "weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": "\\ud800.safetensors"}}',
        *(
            json.dumps({"metadata": {}, "weight_map": {"a": shard}})
            for shard in (
                "../up.safetensors",
                "/etc/x.safetensors",
                "sub/x.safetensors",
                "..",
                "pytorch_model.bin",
                "a\0.safetensors",
                "a\n.safetensors",
                ".hidden.safetensors",
                "a" * 5000 + ".safetensors",
                "",
            )
        ),
        json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}),
        json.dumps({"metadata": None, "weight_map": {"a": FIRST, "b": SECOND}}),
    ],
)
def test_broken_indexes_are_refused(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path / "m")
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder)
    assert INDEX in str(caught.value)
    assert caught.value.fix
    assert len(str(caught.value)) < 1000


def test_weights_are_there_when_all_of_them_are(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    assert holds_weights(folder)
    assert checkpoint_files(folder) == ("config.json", FIRST, SECOND, INDEX)
    (folder / SECOND).unlink()
    assert not holds_weights(folder)
    assert checkpoint_files(folder) == ("config.json",)
