"""Where results go: nothing half-written under a final name, one owner, refusals before work."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from retrofit.checkpoint import staging
from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.staging import beside, require_free_space, require_writable, staged
from retrofit.errors import UserError
from tests.killing import dying, hunted, nothing


def test_staged_renames_when_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with staged(final) as partial:
        assert partial == final.with_name("out.partial")
        assert not final.exists()
        (partial / "a").write_text("1")
    assert (final / "a").read_text() == "1"
    assert not partial.exists()


def test_staged_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_staged_empties_what_a_kill_left(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").write_text("")
    (tmp_path / ".out.partial.staging").write_text(str((tmp_path / "out.partial").stat().st_ino))
    with staged(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_staged_refuses_a_full_folder_and_takes_an_empty_one(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    with staged(final) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(UserError, match="exists and is not empty"), staged(final):
        pass
    assert (final / "a").read_text() == "1"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"), staged(tmp_path / "file"):
        pass


def test_staged_follows_a_link_to_an_empty_folder_or_to_none_yet(tmp_path: Path) -> None:
    (tmp_path / "disk" / "there").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    for name, keep in (("there", None), ("not yet", None), ("kept", tmp_path / "work" / "checkpoint")):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / "disk" / name)
        with staged(link, keep=keep) as partial:
            (partial / "a").write_text("1")
        assert link.is_symlink()
        assert (tmp_path / "disk" / name / "a").read_text() == "1"
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"there", "not yet", "kept"}


def test_staged_refuses_a_work_folder_on_another_disk_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_disk", lambda path: "work" in path.parts)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="different disks") as caught, staged(tmp_path / "link", keep=tmp_path / "work"):
        pass
    assert str(tmp_path / "out") in str(caught.value.fix)
    assert not (tmp_path / "work").exists()


def test_staged_overwrites_when_asked_and_keeps_the_old_one_on_error(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with staged(final) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), staged(final, overwrite=True):
        raise RuntimeError
    assert (final / "a").read_text() == "1"
    with staged(final, overwrite=True) as partial:
        (partial / "b").write_text("2")
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_staged_restores_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "a").write_text("1")
    (tmp_path / ".out.replaced.staging").write_text(str((tmp_path / "out.replaced").stat().st_ino))
    with pytest.raises(RuntimeError), staged(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_staged_removes_no_folder_that_is_not_its_own(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    (tmp_path / f".{name}.staging").write_text("1")  # of a folder that was ours, and is gone
    with pytest.raises(UserError, match="not made for that") as caught, staged(tmp_path / "out", overwrite=overwrite):
        pass
    assert caught.value.where == str(tmp_path / name)
    assert (tmp_path / name / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [None, "work"])
def test_staged_does_not_replace_what_came_while_it_wrote(keep: str | None, tmp_path: Path) -> None:
    final, work = tmp_path / "out", tmp_path / keep if keep else None
    with pytest.raises(UserError, match="exists and is not empty"), staged(final, keep=work) as partial:
        (partial / "a").write_text("1")
        final.mkdir()
        (final / "moments").write_text("hours of work")
    assert [path.name for path in final.iterdir()] == ["moments"]
    assert not (tmp_path / "out.partial").exists()
    assert work is None or (work / "a").read_text() == "1"


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"), writing(tmp_path / "out"), staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_killed_process_leaves_no_final_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from retrofit.checkpoint.lock import folder_lock\n"
        "from retrofit.checkpoint.staging import staged\n"
        "with folder_lock(sys.argv[1]), staged(sys.argv[1]) as p:\n"
        "    (p / 'a').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "a").exists()
    assert not (tmp_path / "out").exists()
    with folder_lock(tmp_path / "out"), staged(tmp_path / "out") as partial:  # the lock died with its owner
        assert list(partial.iterdir()) == []


def test_no_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    require_free_space(tmp_path / "not" / "yet", 10**9)
    with pytest.raises(UserError, match=r"2\.5 GB needed, 1\.0 GB free") as caught:
        require_free_space(tmp_path / "not" / "yet", 25 * 10**8)
    assert "1.5 GB" in str(caught.value.fix)
    assert list(tmp_path.iterdir()) == []


def test_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        require_writable(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="is a file"), staged(tmp_path / "file" / "out"):
        pass
    with pytest.raises(UserError, match="is a file"), folder_lock(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("target", ["nowhere/x", "link"])
@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_link_that_leads_nowhere_is_no_place_to_write(target: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match="link is a symbolic link to something that is not there"):
        require_writable(tmp_path / "link" / below)


def test_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    with pytest.raises(UserError, match="no permission") as caught:
        require_writable(tmp_path / "a" / "b")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no permission"), staged(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_beside_is_emptied_after_a_kill_and_never_taken_from_somebody(tmp_path: Path) -> None:
    left = tmp_path / "long.gguf.partial"
    with pytest.raises(KeyError), beside(tmp_path / "long", "gguf") as place:
        assert place == left
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    hunted(lambda limit: _killed_inside(tmp_path / "long", limit), ["inside:1"])
    assert list(tmp_path.iterdir()) == []
    left.mkdir()
    (left / "mine").write_text("x")
    with pytest.raises(UserError, match="was not made for that"), beside(tmp_path / "long", "gguf"):
        pass
    assert (left / "mine").read_text() == "x"


def _killed_inside(path: Path, limit: str) -> None:
    with beside(path, "gguf") as place:
        assert not list(place.iterdir())
        (place / "half").write_text("x")
        dying("inside", limit, nothing, nothing)()
