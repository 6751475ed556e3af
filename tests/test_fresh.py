"""A fresh process answers, keeps to its limits, and ends with the process that started it."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.fresh import FreshError, run_fresh

GIB = 1 << 30


def script(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(f"import os, sys, time\n\ndef main(job):\n    {body}\n")
    return path


def test_a_job_is_answered_without_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    body = "print('noise'); return {'twice': 2 * job['x'], 'cwd': os.getcwd(), 'token': os.environ.get('HF_TOKEN')}"
    result = run_fresh(script(tmp_path, body), {"x": 4}, seconds=600, memory=GIB, cwd=tmp_path)
    assert result == {"twice": 8, "cwd": str(tmp_path.resolve()), "token": None}


@pytest.mark.parametrize(
    ("body", "seconds", "said"),
    [
        ("raise ValueError('\\x1b[2Jno')", 600, r"ValueError: \\x1b\[2Jno"),
        ("os.kill(os.getpid(), 9)", 600, "code -9"),
        ("time.sleep(600)", 1, "did not finish in 1 s"),
    ],
)
def test_what_goes_wrong_is_told(tmp_path: Path, body: str, seconds: int, said: str) -> None:
    with pytest.raises(FreshError, match=said):
        run_fresh(script(tmp_path, body), {}, seconds=seconds, memory=GIB, cwd=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's data")
def test_memory_is_limited(tmp_path: Path) -> None:
    with pytest.raises(FreshError, match="MemoryError"):
        run_fresh(script(tmp_path, "return {'x': len('a' * (1 << 50))}"), {}, seconds=600, memory=GIB, cwd=tmp_path)


@pytest.mark.parametrize(("memory", "seen"), [(GIB, ""), (None, "3")])
def test_gpus_are_seen_without_a_limit_of_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int | None, seen: str
) -> None:
    """A GPU's driver reserves more address space than any limit allows."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    limits = "*__import__('resource').getrlimit(__import__('resource').RLIMIT_DATA)"
    body = f"return {{'found': [os.environ['CUDA_VISIBLE_DEVICES'], {limits}]}}"
    result = run_fresh(script(tmp_path, body), {}, seconds=600, memory=memory, cwd=tmp_path)
    now = list(resource.getrlimit(resource.RLIMIT_DATA))
    assert result["found"][0] == seen
    if sys.platform == "linux":
        assert (result["found"][1:] == now) == (memory is None)


PARENT = """
from collections.abc import Callable
from pathlib import Path
from retrofit.fresh import run_fresh
run_fresh(Path({script!r}), {{}}, seconds=600, memory=1 << 30, cwd=Path({cwd!r}))
"""


@pytest.mark.parametrize("ways", ["signal and pipe", "pipe alone"])
def test_it_ends_when_its_parent_is_killed(tmp_path: Path, ways: str) -> None:
    pid = tmp_path / "pid"
    undo = "import ctypes; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); " if ways == "pipe alone" else ""
    if undo and sys.platform != "linux":
        pytest.skip("there is no signal to undo")
    body = f"{undo}open('new', 'w').write(str(os.getpid())); os.rename('new', 'pid'); time.sleep(600)"
    code = PARENT.format(script=str(script(tmp_path, body)), cwd=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: pid.exists())
    child = int(pid.read_text())
    assert running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait(lambda: not running(child))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pid", "script.py"]


def running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def wait(true: Callable[[], bool]) -> None:
    """Until it is true, however long that takes on a busy machine."""
    while not true():
        time.sleep(0.02)
