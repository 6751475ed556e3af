"""A run that is killed again and again ends where an undisturbed one ends: the same weights, the same numbers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from retrofit.checkpoint.provenance import sha256
from retrofit.workflow.journal import Entry, Journal
from tests.workflow.conftest import retrofit, sections

ROOT = Path(__file__).resolve().parents[2]


# Where each attempt dies, by task and sign of life or by the name a file is about to get, in the order of a run.
LIMITS = [
    "convert heads:2",
    "rename:state.json",
    "write weights:1",
    "write weights:5",
    "rename:1-convert",
    "recover:1",
    "recover:6",
    "rename:recover.json",
    "recover:3",
    "score:1",
    "rename:original.npz",
    "score:2",
    "score:2",
]


def killed_run(recipe: Path, calm: Path, hunted: Path, limits: list[str]) -> list[str]:
    arguments = [sys.executable, "-m", "tests.workflow.kill_child", *map(str, (recipe, calm, hunted)), *limits]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("exact_products")  # bfloat16 is slow where it is only said to be there
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(tmp_path: Path, model: Path, texts: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = sections(model, texts)
    values["convert"] = {
        "kv_heads": 1,
        "method": "calibrated",
        "repair": "none",
        "calibration": {"tokens": 256, "sequence_length": 64, "text": [str(texts / "train")]},
    }
    values["publish"] = None
    recipe.write_text(yaml.safe_dump(values))
    places = killed_run(recipe, tmp_path / "calm", tmp_path / "hunted", LIMITS)
    assert places == [*(limit.partition(":")[0] for limit in LIMITS), "done"]

    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    for folder in ("1-convert", "3-extend", "4-recover"):
        weights = [sha256(run / folder / "model.safetensors") for run in (calm, hunted)]
        assert weights[0] == weights[1], folder
    metrics = [json.loads((run / "5-evaluate" / "metrics.json").read_text())["metrics"] for run in (calm, hunted)]
    assert metrics[0] == metrics[1]
    lines = [json.loads(line) for line in (hunted / "journal.jsonl").read_text().splitlines()]
    (recovery,) = [line for line in lines if line.get("step") == "recover"]
    assert recovery["result"]["resumed_from"] > 0, "training went on from its own checkpoint"
    assert not [path for path in hunted.rglob("*") if "partial" in path.name or path.name.endswith(".work")]


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**sections(model, texts), "publish": None}))
    append = Journal.append

    def interrupted(journal: Journal, entry: Entry) -> None:
        append(journal, entry)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Journal, "append", interrupted)
    # A shell's background job inherits an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = retrofit("run", recipe, "--out", tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.exit_code == 130, stopped.output
    assert "same command again" in stopped.stderr
    assert "Traceback" not in stopped.output
