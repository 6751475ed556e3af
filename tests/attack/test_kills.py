"""A run that is killed at random moments, a hundred times in all, ends where an undisturbed one ends."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from retrofit.checkpoint.provenance import sha256
from tests.killing import settle
from tests.workflow.conftest import sections

KILLS = 10
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_in_a_child(recipe: Path, out: Path) -> int:
    """Start the run in a fork of this process, quiet; returns the child's process id."""
    import retrofit

    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 (until the process ends)
        for number in SIGNALS:
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
        retrofit.run(recipe, out=out)
        code = 0
    finally:
        os._exit(code)


def result(run: Path) -> dict[str, Any]:
    """Bytes of every weight and the metrics."""
    weights = {str(path.relative_to(run)): sha256(path) for path in sorted(run.rglob("*.safetensors"))}
    return {**weights, "metrics": json.loads((run / "5-evaluate" / "metrics.json").read_text())["metrics"]}


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(10))
def test_killed_runs(seed: int, tmp_path: Path, model: Path, texts: Path) -> None:
    generator = random.Random(seed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(sections(model, texts)))
    began = time.monotonic()
    _, status = os.waitpid(run_in_a_child(recipe, tmp_path / "calm"), 0)
    whole = time.monotonic() - began
    assert status == 0
    settle()
    for _ in range(KILLS):
        child = run_in_a_child(recipe, tmp_path / "hunted")
        time.sleep(generator.uniform(0, 0.6 * whole))
        os.kill(child, generator.choice(SIGNALS))
        os.waitpid(child, 0)
    _, status = os.waitpid(run_in_a_child(recipe, tmp_path / "hunted"), 0)
    assert status == 0
    assert result(tmp_path / "hunted") == result(tmp_path / "calm")
    left = [
        path.name for path in (tmp_path / "hunted").rglob("*") if path.name.endswith((".work", ".partial", ".staging"))
    ]
    assert not left
