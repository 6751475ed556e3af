"""A re-expression that is killed resumes at its shard and ends with the same bytes; memory is that of a tensor."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.write import ShardWriter
from retrofit.model.load import load_config
from retrofit.model.reexpress import reexpression_of
from retrofit.model.reexpress.write import stored_names
from tests.model.reexpressed import FIRST, firsts, reexpress, save

ROOT = Path(__file__).resolve().parents[2]
LIMITS = ["tensor:2", "tensor:9", "close:1", "config:1"]
CASES = [("gpt_neox", "alone"), ("opt", "alone"), ("gpt2", "1")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def source_of(folder: Path, name: str) -> Path:
    fields = next(fields for one, _, fields in FIRST if one == name)
    return save(folder, name, fields, dtype="bfloat16", shard="50KB")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each of CASES: its undisturbed result is in `calm`, that of many kills in `hunted`."""
    folder, command = tmp_path_factory.mktemp("killed"), [sys.executable, "-m", "tests.model.kill_reexpress"]
    for source, what in CASES:
        place = folder / source
        limits = LIMITS if what == "alone" else [*LIMITS, "tensor:3", "converted:1"]
        command += [
            *map(str, (source_of(place / "source", source), place / "calm", place / "hunted")),
            what,
            *limits,
            "--",
        ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(("source", "what"), CASES)
def test_a_killed_re_expression_ends_with_the_same_bytes(source: str, what: str, killed: Path) -> None:
    alone, calm, hunted = what == "alone", killed / source / "calm", killed / source / "hunted"
    said = json.loads(Path(f"{hunted}.said").read_text())
    assert any("were written before, and are kept" in line for line in said), said
    assert contents(calm) == contents(hunted)
    assert len(list(calm.glob("*.safetensors"))) > 2
    caches = [contents(Path(f"{out}.cache")) for out in (calm, hunted)]
    assert caches[0] == caches[1]
    assert bool(caches[0]) == (not alone)
    assert not Path(f"{hunted}.work").exists()
    assert not list(killed.rglob("*.shard-*"))


def test_whole_shards_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.model.reexpress import reexpress as write_reexpressed

    folder, out = source_of(tmp_path / "source", "gpt_neox"), tmp_path / "out"
    out.mkdir()
    add, names = ShardWriter.add, []

    def stopped(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        names.append(name)
        if len(names) == 25:
            raise KeyboardInterrupt
        add(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_reexpressed(folder, out, max_shard_size="40KB", resume=True)
    shards = {path.name: path.stat() for path in out.glob(".shard-*")}
    assert len(shards) > 2
    monkeypatch.setattr(ShardWriter, "add", add)
    write_reexpressed(folder, out, max_shard_size="40KB", resume=True)
    inodes = {path.stat().st_ino: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    whole = [stat for name, stat in shards.items() if name != max(shards)]
    assert all(inodes.get(stat.st_ino) == stat.st_mtime_ns for stat in whole), "written again"


@firsts
def test_memory_is_that_of_one_tensor_and_what_it_is_made_of(
    source: str, target: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stored tensors only those that the present one is made of are alive, whatever the model's size."""
    folder = save(tmp_path / "source", source, fields)
    found = reexpression_of(load_config(folder), target)
    assert found is not None
    checkpoint = Checkpoint.open(folder)
    stored = stored_names(found, checkpoint)
    allowed = {frozenset(stored[name] for name in made.sources) for made in found.tensors.values()}
    alive: dict[str, weakref.ref[torch.Tensor]] = {}
    read = Checkpoint.tensor

    def now() -> frozenset[str]:
        return frozenset(name for name, tensor in alive.items() if tensor() is not None)

    def reading(self: Checkpoint, name: str) -> torch.Tensor:
        assert any(now() | {name} <= some for some in allowed), (name, now())
        tensor = read(self, name)
        alive[name] = weakref.ref(tensor)
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", reading)
    reexpress(folder, tmp_path / "out", target=target)
    assert set(alive) == set(stored.values())
    assert not now()
