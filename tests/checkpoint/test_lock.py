"""One owner of an output, and no harm to what stands under the lock's name."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from retrofit.checkpoint import lock
from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.console import Silent
from retrofit.errors import UserError


def test_folder_in_use(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "out"):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), folder_lock(tmp_path / "out"):
            pass
        with folder_lock(tmp_path / "other"):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with pytest.raises(UserError, match="in use"), folder_lock(tmp_path / "link"):
            pass
        (tmp_path / "link").unlink()
    with folder_lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_waits_gets_it_when_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.001)
    held, release, order, said = threading.Event(), threading.Event(), [], Silent()

    def first() -> None:
        with folder_lock(tmp_path / "out"):
            held.set()
            release.wait(20)
            order.append("first")

    class Told(Silent):
        def note(self, text: str) -> None:
            said.note(text)
            release.set()

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(20)
    with folder_lock(tmp_path / "out", wait=True, progress=Told()):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert len(said.notes) == 1
    assert f"waiting for process {os.getpid()}" in said.notes[0]


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder", "pipe", "hard link", "of another program"])
def test_what_is_no_lock_of_ours_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    at, thesis = tmp_path / ".out.lock", tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    if kind == "file":
        at.write_text("years of work")
    elif kind == "link":
        at.symlink_to(thesis)
    elif kind == "dangling":
        at.symlink_to(tmp_path / "nothing")
    elif kind == "folder":
        at.mkdir()
    elif kind == "pipe":
        os.mkfifo(at)
    elif kind == "hard link":
        at.hardlink_to(thesis)
    else:
        at.write_text("4711\n")
    before = sorted((path.name, path.lstat().st_ino, path.lstat().st_size) for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="what stands there is not one"), folder_lock(tmp_path / "out"):
        pass
    assert sorted((path.name, path.lstat().st_ino, path.lstat().st_size) for path in tmp_path.iterdir()) == before
    assert thesis.read_text() == "years of work"


def test_a_lock_that_a_kill_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("retrofit, process 4711\n")
    with folder_lock(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == f"retrofit, process {os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_leaves_no_room_for_the_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"), folder_lock(tmp_path / ("x" * 255)):
        pass


@pytest.mark.parametrize("name", ["file", "folder/file"])
def test_where_nothing_can_be_made_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /proc, which says of itself that it can be written to."""

    def refuse(*_: object, **__: object) -> int:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(lock.os, "open", refuse)
    monkeypatch.setattr(lock.os, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot write there: No such file"), folder_lock(tmp_path / name):
        pass


def test_a_disk_too_full_for_the_lock_is_told_by_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write names no file: a block outside that writes to another disk would name that one."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.os, "pwrite", full)
    with pytest.raises(UserError, match="disk is full") as caught, writing("/elsewhere"), folder_lock(tmp_path / "out"):
        pass
    assert caught.value.where == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
