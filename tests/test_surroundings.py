"""What a command is started in: streams that are closed or gone, several processes, signals, a folder that is gone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrofit import api, surroundings
from retrofit.cli import main, streams
from retrofit.errors import UserError
from retrofit.files import local_path, output_path


def child(work: Callable[[], None]) -> int:
    """The exit code of a fork of this process that does some work with descriptors of its own."""
    if (pid := os.fork()) == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            work()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*arguments: str) -> None:
    assert api.schema()  # imported before the fork
    sys.argv = ["retrofit", *arguments]
    main.main()


def onto(path: str, number: int) -> None:
    os.dup2(os.open(path, os.O_WRONLY), number)


def broken_pipe(number: int) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, number)


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (lambda: onto("/dev/full", 1), 2),
        (lambda: broken_pipe(1), streams.BROKEN_PIPE),
        (lambda: os.close(1), 0),
        (lambda: (os.close(0), os.close(1), os.close(2)), 0),
        (lambda: broken_pipe(2), 0),
        (lambda: onto("/dev/full", 2), 0),
    ],
    ids=["stdout full", "stdout gone", "stdout closed", "all closed", "stderr gone", "stderr full"],
)
def test_what_nobody_reads_ends_no_command(broken: Callable[[], None], code: int) -> None:
    def work() -> None:
        broken()
        if not _open(1) or not _open(2):
            sys.stdout = sys.stderr = None  # type: ignore[assignment] - as Python starts with closed ones
        command("schema")

    assert child(work) == code


def _open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_a_closed_descriptor_is_not_left_to_the_next_file(tmp_path: Path) -> None:
    def work() -> None:
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
        streams.repair()
        with (tmp_path / "file").open("w") as file:
            assert file.fileno() > 2
            os.write(1, b"words of a C library")

    assert child(work) == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("name", surroundings.WORLD_SIZES)
def test_processes_that_do_not_know_of_each_other_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    surroundings.require_usable()
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="one of 2 processes") as caught:
        surroundings.require_usable()
    assert caught.value.exit_code == 2


def test_a_folder_that_is_gone_and_a_umask_against_oneself_are_refused(tmp_path: Path) -> None:
    def gone() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        command("schema")

    def masked() -> None:
        os.umask(0o777)
        command("schema")

    assert child(gone) == 2
    assert child(masked) == 2


def test_python_without_docstrings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings.sys, "flags", SimpleNamespace(optimize=2))
    with pytest.raises(UserError, match="without docstrings"):
        surroundings.require_usable()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_unwinds(number: signal.Signals) -> None:
    undone = []
    before = signal.signal(number, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
    try:
        with pytest.raises(surroundings.Stopped) as caught, surroundings.stopping():
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            finally:
                undone.append(number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert undone == [number]
    assert caught.value.exit_code == 128 + number


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with surroundings.stopping():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["", " ", "x" * 240, "a\0b", "a\udcff", "~nosuchuser/x", "d/" * 1800 + "x"])
def test_no_output_has_a_name_that_cannot_be_written(name: str) -> None:
    with pytest.raises(UserError) as caught:
        output_path(name, where="--out")
    assert caught.value.where == "--out"


def test_an_input_may_have_a_longer_name_than_an_output(tmp_path: Path) -> None:
    name = tmp_path / ("x" * 240)
    assert local_path(name) == name
