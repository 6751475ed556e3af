"""Tensors that are made, and an interrupted rewrite that is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.rewrite import rewrite
from retrofit.console import Silent
from tests.checkpoint.test_rewrite import CONFIG, loaded, source


def test_made_tensors_stand_in_place_without_reading_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    made = {"layers.1.k.weight": lambda: torch.full((2, 6), 0.3)}
    report = rewrite(checkpoint, tmp_path / "out", {}, made=made, config=CONFIG)
    after = loaded(tmp_path / "out")
    assert torch.equal(after["layers.1.k.weight"], torch.full((2, 6), 0.3).bfloat16())
    assert report.changed == ("layers.1.k.weight",)
    with pytest.raises(ValueError, match="ghost"):
        rewrite(checkpoint, tmp_path / "out", {}, made={"ghost": lambda: torch.ones(1)}, config=CONFIG)


def interrupted(checkpoint: Checkpoint, out: Path) -> None:
    """Rewrite until a tensor that fails; the shards before it are whole."""

    def fails() -> torch.Tensor:
        raise InterruptedError

    made = {"layers.0.q.weight": lambda: torch.ones(8, 6), "layers.2.k.weight": fails}
    out.mkdir()
    with pytest.raises(InterruptedError):
        rewrite(checkpoint, out, {}, made=made, config=CONFIG, max_shard_size="300B", resume=True)


@pytest.mark.parametrize("end", ["killed", "renamed", "torn"])
def test_whole_shards_of_an_interrupted_call_are_kept(end: str, tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "in")
    made = {"layers.0.q.weight": lambda: torch.ones(8, 6), "layers.2.k.weight": lambda: torch.ones(3, 6)}
    (tmp_path / "calm").mkdir()
    rewrite(checkpoint, tmp_path / "calm", {}, made=made, config=CONFIG, max_shard_size="300B")
    out = tmp_path / "out"
    interrupted(checkpoint, out)
    parts = sorted(out.glob(".shard-*"))
    assert len(parts) > 2
    if end == "renamed":  # killed while the shards got their names
        parts[0].rename(out / "model-00001-of-00005.safetensors")
    if end == "torn":
        parts[0].write_bytes(parts[0].read_bytes()[:-1])
    before = {path.stat().st_ino for path in out.iterdir()}
    told = Silent()
    rewrite(checkpoint, out, {}, made=made, config=CONFIG, max_shard_size="300B", resume=True, progress=told)
    whole = len(parts) - 1 - (end == "torn")  # the last one was being written
    assert told.notes == [f"{whole} weight files were written before, and are kept"]
    names = sorted(path.name for path in (tmp_path / "calm").iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    assert all((out / name).read_bytes() == (tmp_path / "calm" / name).read_bytes() for name in names)
    assert len(before & {path.stat().st_ino for path in out.iterdir()}) >= whole, "not written again"


def test_shards_of_another_layout_are_announced_and_written_again(tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "in")
    out = tmp_path / "out"
    interrupted(checkpoint, out)
    made = {"layers.0.q.weight": lambda: torch.ones(2, 6)}  # another shape in the first shard
    told = Silent()
    rewrite(checkpoint, out, {}, made=made, config=CONFIG, max_shard_size="300B", resume=True, progress=told)
    assert any("something else" in note for note in told.notes)
    assert torch.equal(loaded(out)["layers.0.q.weight"], torch.ones(2, 6).bfloat16())
    assert not list(out.glob(".shard-*"))
