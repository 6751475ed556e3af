"""A cached folder is used while it holds what was written into it, and made again otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.console import Silent
from retrofit.errors import UserError
from retrofit.model.cache import MANIFEST, cached, sound


def make(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "a.jinja").write_text("a")


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def _folder_for_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda folder: (folder / "more" / "a.jinja").write_text("b"), "more/a.jinja was changed"),
    "added": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json was added"),
    "hidden": (lambda folder: (folder / "more" / ".x").write_text(""), "more/.x was added"),
    "a link added": (lambda folder: (folder / "x").symlink_to("nowhere"), "x was added"),
    "removed": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a link": (_link, "config.json was changed"),
    "a folder": (_folder_for_file, "config.json is missing"),
    "no digests": (lambda folder: (folder / MANIFEST).unlink(), "its digests cannot be read"),
    "broken digests": (lambda folder: (folder / MANIFEST).write_text("{"), "its digests cannot be read"),
    "other digests": (lambda folder: (folder / MANIFEST).write_text('{"config.json": 1}'), "was changed"),
    "emptied": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "its digests cannot be read"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_that_was_changed_is_told_and_made_again(name: str, tmp_path: Path) -> None:
    change, says = CHANGES[name]
    folder = cached(tmp_path / "made", make)
    before = written(folder)
    change(folder)
    assert not sound(folder, progress := Silent())
    assert says in progress.notes[0]
    cached(folder, make)
    assert written(folder) == before


def test_a_sound_folder_is_not_made_again(tmp_path: Path) -> None:
    folder = cached(tmp_path / "made", make)
    assert sound(folder, progress := Silent())
    assert progress.notes == []
    cached(folder, lambda _: pytest.fail("made again"))


def test_what_another_process_made_meanwhile_is_used(tmp_path: Path) -> None:
    assert not sound(tmp_path / "made")
    cached(tmp_path / "made", make)
    assert sound(cached(tmp_path / "made", lambda _: pytest.fail("made again")))


def test_a_file_in_place_of_a_folder_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("x")
    with pytest.raises(UserError, match="a file is where a folder of the cache belongs"):
        cached(tmp_path / "made", make)
