"""A run that is killed again and again ends where an undisturbed one ends: the same weights, the same numbers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from retrofit.checkpoint.provenance import sha256
from tests.pipeline.conftest import sections

ROOT = Path(__file__).resolve().parents[2]


# Where each attempt dies, by task and sign of life, in the order a run comes there; and wherever the clock strikes.
LIMITS = [
    "convert heads:2",
    "write weights:1",
    "0.2s",
    "write weights:5",
    "recover:1",
    "recover:6",
    "0.3s",
    "recover:3",
    "score:1",
    "0.1s",
    "score:2",
    "score:2",
]


def killed_run(recipe: Path, calm: Path, hunted: Path, limits: list[str]) -> list[str]:
    arguments = [sys.executable, "-m", "tests.pipeline.kill_child", *map(str, (recipe, calm, hunted)), *limits]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


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
    assert places[-1] == "done" and len(places) > 10
    assert {"convert heads", "write weights", "recover", "score"} <= set(places), places

    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    for folder in ("1-convert", "2-extend", "3-recover"):
        weights = [sha256(run / folder / "model.safetensors") for run in (calm, hunted)]
        assert weights[0] == weights[1], folder
    metrics = [json.loads((run / "4-evaluate" / "metrics.json").read_text())["metrics"] for run in (calm, hunted)]
    assert metrics[0] == metrics[1]
    lines = [json.loads(line) for line in (hunted / "journal.jsonl").read_text().splitlines()]
    (recovery,) = [line for line in lines if line["step"] == "recover"]
    assert recovery["result"]["resumed_from"] > 0, "training went on from its own checkpoint"
    assert not [path for path in hunted.rglob("*") if "partial" in path.name or path.name.endswith(".work")]


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, model: Path, texts: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**sections(model, texts), "publish": None}))
    command = [sys.executable, "-m", "retrofit", "run", str(recipe), "--out", str(tmp_path / "out")]

    def listen() -> None:  # a shell's background job inherits an ignored SIGINT, and Python leaves it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, preexec_fn=listen)
    journal = tmp_path / "out" / "journal.jsonl"
    until = time.monotonic() + 120
    while not journal.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "same `retrofit run` command again" in said and "Traceback" not in said
