"""A copied file is a file of its own, unless a hard link is asked for."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from retrofit.checkpoint import copying, staging
from retrofit.checkpoint.copying import copy_file
from retrofit.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"abc" * 1000)
    (tmp_path / "link").symlink_to("weights")
    return tmp_path / "link"


@pytest.mark.parametrize("shares", [True, False])
def test_a_copy_is_a_file_of_its_own(
    shares: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cloned(read: object, written: object) -> bool:
        written.write(source.read_bytes())  # type: ignore[attr-defined]
        return True

    if shares:
        monkeypatch.setattr(copying, "_cloned", cloned)
    copy_file(source, tmp_path / "copy")
    (tmp_path / "copy").open("r+b").write(b"x")
    assert (tmp_path / "copy").read_bytes() == b"x" + source.read_bytes()[1:]
    assert source.read_bytes() == b"abc" * 1000
    assert not (tmp_path / "copy").is_symlink()


def test_a_link_is_made_where_it_is_asked_for_and_possible(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_file(source, tmp_path / "linked", link=True)
    assert (tmp_path / "linked").samefile(source)

    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    copy_file(source, tmp_path / "copy", link=True)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert not (tmp_path / "copy").samefile(source)


@pytest.mark.parametrize("link", [True, False])
def test_nothing_is_overwritten(link: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("years of work")
    with pytest.raises(FileExistsError):
        copy_file(source, tmp_path / "mine", link=link)
    assert (tmp_path / "mine").read_text() == "years of work"


def test_no_room_leaves_no_part(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_cloned", lambda *_: False)
    monkeypatch.setattr(staging, "free_space", lambda _: 10)
    with pytest.raises(UserError, match="not enough disk space"):
        copy_file(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
