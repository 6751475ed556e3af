"""A busy machine is not asked for more threads than it has free cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from retrofit.console import Silent
from retrofit.entry import begun
from retrofit.system import threads
from retrofit.system.threads import SET_BY, free_threads, load, sharing_cores


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Torch would use four threads, and nobody has chosen; what it was told."""
    for name in SET_BY:
        monkeypatch.delenv(name, raising=False)
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.mark.parametrize(
    ("cores", "busy", "usual", "used"),
    [(4, 0.2, 4, 4), (4, 1.0, 4, 3), (4, 2.6, 4, 1), (4, 9.0, 4, 1), (64, 30.0, 2, 2), (8, 3.0, 4, 4), (1, 5.0, 1, 1)],
)
def test_threads_are_the_cores_that_are_free(
    monkeypatch: pytest.MonkeyPatch, cores: int, busy: float, usual: int, used: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(threads, "load", lambda: busy)
    assert free_threads(usual) == used


def test_a_command_says_so_and_gives_them_back(monkeypatch: pytest.MonkeyPatch, torch_threads: list[int]) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "load", lambda: 2.0)
    progress = Silent()
    with begun("work", progress):
        assert torch_threads == [2]
    assert torch_threads == [2, 4]
    assert "other work is running: 2 of 4 threads are used (OMP_NUM_THREADS=4: all)" in progress.notes


def test_a_quiet_machine_and_a_number_that_was_chosen_change_nothing(
    monkeypatch: pytest.MonkeyPatch, torch_threads: list[int]
) -> None:
    progress = Silent()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "load", lambda: 0.0)
    with sharing_cores(progress):
        pass
    monkeypatch.setattr(threads, "load", lambda: 4.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with sharing_cores(progress):
        pass
    assert torch_threads == []
    assert progress.notes == []


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, torch_threads: list[int]) -> None:
    progress = Silent()
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "load", lambda: 7.0)  # the other processes
    with sharing_cores(progress, 4):
        assert torch_threads == [2]
    assert progress.notes == []
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    with sharing_cores(progress, 4):
        pass
    assert progress.notes == [
        "each of 4 processes computes with 4 of the 16 cores it could have on the CPU: OMP_NUM_THREADS=16 uses them"
    ]


def test_work_that_has_ended_is_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 2.0, 1.0))
    monkeypatch.setattr(threads, "_LOAD", tmp_path / "loadavg")
    assert load() == 3.0
    (tmp_path / "loadavg").write_text("3.00 2.00 1.00 1/104 27096\n")
    assert load() == 0.0
    (tmp_path / "loadavg").write_text("3.00 2.00 1.00 9/104 27096\n")
    assert load() == 3.0

    def unknown() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert load() == 0.0
