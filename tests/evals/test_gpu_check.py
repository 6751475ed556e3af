"""The check for a GPU, in its reduced form on a CPU, and what its runner does with parts that fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.gpu import attention, check, commands, models
from evals.gpu.parts import Part, Setting

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", True, tmp_path, None)


@pytest.mark.parametrize("part", [attention.correct, attention.speed, models.families, models.scoring])
def test_a_part_runs_on_a_cpu(part: Part, setting: Setting) -> None:
    rows = list(part(setting))
    assert rows
    assert not [row for row in rows if row.passed is False]


def test_decoding_has_both_numbers_of_every_batch(setting: Setting) -> None:
    rows = [row.what for row in models.decoding(setting)]
    assert len([what for what in rows if what.endswith("growing cache")]) == 4
    assert len([what for what in rows if what.endswith("at once: loop")]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("part", [commands.training, commands.search, commands.large, commands.demo])
def test_a_command_runs_on_a_cpu(part: Part, setting: Setting) -> None:
    rows = list(part(setting))
    assert [row for row in rows if row.predicted is not None]


def test_the_reference_is_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attention.reference(q, k, v, window=None), expected)
    assert torch.allclose(attention.reference(q, k, v, window=1), v)


def test_a_part_that_fails_hangs_or_dies_does_not_lose_the_others(setting: Setting) -> None:
    here = "tests.evals.made_up_parts"
    shares = {"broken": 100.0, "dead": 100.0, "wrong": 100.0, "endless": 8.0, "right": 300.0}
    parts = {name: (f"{here}:{name}", share) for name, share in shares.items()}
    found = check.check([*parts], setting, 5.0, parts)
    assert "no luck" in found["broken"]["error"]
    assert found["broken"]["rows"][0]["what"] == "before"
    assert "its process ended with 9" in found["dead"]["error"]
    assert found["wrong"]["failed"] == ["error"]
    assert found["right"]["error"] == ""
    assert found["right"]["failed"] == []
    allowed = int(re.search(r"more than (\d+) s", found["endless"]["error"])[1])  # type: ignore[index]
    assert 1 <= allowed <= 8, "its share of the 5 minutes"
    assert found["endless"]["rows"][0]["what"] == "before"
    table = check.markdown({"machine": check.machine(setting), "command": "c", "parts": found})
    assert "| error | 9 nats | 2 | FAILED | a / b |" in table
    assert "| rate | 12,345 tokens/s |  | passed |  |" in table
    assert "## broken: failed" in table


def test_time_that_is_over_leaves_parts_unbegun(setting: Setting) -> None:
    found = check.check(["right"], setting, 0.0, {"right": ("tests.evals.made_up_parts:right", 600.0)})
    assert found["right"]["error"] == "it was not begun"


def test_the_script_writes_both_files_and_its_exit_code_says_whether_all_passed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "evals/gpu/check.sh"), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--reduced", "--only", "kernels"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 parts passed" in done.stdout
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["parts"]["kernels"]["rows"][0]["passed"] is True
    assert found["machine"]["reduced"] is True
    assert "its numbers mean nothing" in (tmp_path / "out" / "gpu.md").read_text()
    if not torch.cuda.is_available():
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "--reduced runs on a CPU" in refused.stderr
