"""A conversion that is killed again and again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retrofit.console import Silent
from retrofit.kv_heads.convert import CalibrationText, convert
from retrofit.kv_heads.disk import STATE
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
# In the order a conversion comes there; the source has two layers, and four batches of text.
CALIBRATED = [
    "stream:3",  # embeddings
    "commit:1",
    "stream:14",  # the first layer
    "commit:2",
    "stream:5",  # the second
    "stream:12",
    "copy:1",
    "tensor:3",
    "tensor:7",
    "close:1",
    "config:1",
]


def converted(source: Path, calm: Path, hunted: Path, method: str, limits: list[str]) -> list[str]:
    """What the last attempt in `hunted` was told."""
    command = [sys.executable, "-m", "tests.kv_heads.kill_convert", *map(str, (source, calm, hunted)), method, *limits]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said: list[str] = json.loads(done.stdout)
    return said


def test_shards_of_another_calibration_are_written_again(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", max_shard_size="50KB")
    work, out = tmp_path / "work", tmp_path / "out"

    def one(seed: int) -> CalibrationText:
        ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(seed))
        return CalibrationText(ids, tuple("ab"[i % 2] for i in range(8)))

    def made(out: Path, work: Path | None, seed: int) -> list[str]:
        out.mkdir(exist_ok=True)
        notes = Silent()
        convert(source, out, kv_heads=2, text=one(seed), max_shard_size="60KB", work=work, progress=notes)
        return notes.notes

    for seed in (1, 2):
        made(tmp_path / f"fresh-{seed}", None, seed)
    first, second = contents(tmp_path / "fresh-1"), contents(tmp_path / "fresh-2")
    assert first.keys() == second.keys()
    assert first != second
    made(out, work, 1)
    assert any("were written before, and are kept" in line for line in made(out, work, 1))
    (out / "model.safetensors.index.json").unlink()  # as a kill leaves it
    said = made(out, work, 2)  # another key: the calibration starts again
    assert any("were written from another calibration" in line for line in said), said
    assert contents(out) == second
    state = work / "calibration" / STATE
    state.write_text(state.read_text()[:20])
    made(out, work, 1)
    assert contents(out) == first


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("method", "limits"), [("calibrated", CALIBRATED), ("mean", ["tensor:3", "tensor:5", "close:1"])]
)
def test_a_conversion_killed_at_any_moment_ends_with_the_same_bytes(
    method: str, limits: list[str], tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", "llama", dtype="bfloat16", max_shard_size="50KB")
    said = converted(source, tmp_path / "calm", tmp_path / "hunted", method, limits)
    assert any("were written before, and are kept" in line for line in said), said
    if method == "calibrated":
        assert any("resumes after 2 of 2 layers" in line for line in said), said
    calm, hunted = contents(tmp_path / "calm"), contents(tmp_path / "hunted")
    assert len([name for name in calm if name.endswith(".safetensors")]) > 2, "several shards"
    assert calm == hunted
    if method == "calibrated":
        assert contents(tmp_path / "calm.moments") == contents(tmp_path / "hunted.moments")
