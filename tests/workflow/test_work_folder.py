"""What a stopped command keeps beside its output is its own, and nobody else's folder is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrofit.system.work_folder import kept, require_own
from retrofit.workflow.step import Place
from retrofit.workflow.steps.convert import Convert
from tests.workflow.conftest import retrofit


def stopped(step: Convert, context: object, inputs: object, place: Place) -> None:
    place.work.mkdir(parents=True, exist_ok=True)
    (place.work / "hours").write_text("of work")
    raise KeyboardInterrupt


@pytest.fixture
def commands(model: Path, texts: Path, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """Calls that keep unfinished work, by the folder they keep it in."""
    out, book = ("--out", tmp_path / "new"), texts / "held.txt"
    read = ("--text", book, "--tokens", 512)
    return {
        "convert": ("convert", model, "--kv-heads", 2, "--method", "mean", *out),
        "extend": ("extend", model, "--factor", 2, "--method", "search", "--text", book, *out),
        "recover": ("recover", model, "--teacher", model, "--sequence-length", 64, *read, *out),
        "evaluate": ("evaluate", model, "--text", book, "--lengths", 64, "--out", tmp_path / "new.npz"),
    }


@pytest.mark.parametrize("command", ["convert", "extend", "recover", "evaluate"])
def test_a_folder_of_somebody_else_is_refused_and_stays(command: str, commands: dict, tmp_path: Path) -> None:
    mine = tmp_path / ("new.npz.scored" if command == "evaluate" else "new.work")
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    result = retrofit(*commands[command])
    assert result.exit_code == 2
    assert "holds something else" in result.output
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert sorted(tmp_path.iterdir()) == [mine]


def test_a_stopped_conversion_outlives_other_commands(
    commands: dict, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Convert, "run", stopped)
        retrofit(*commands["convert"])
    (hours,) = (tmp_path / "new.work").rglob("hours")
    for other in ("extend", "recover"):
        result = retrofit(*commands[other])
        assert result.exit_code == 2
        assert "an interrupted `retrofit convert`" in result.output
    result = retrofit("extend", model, "--factor", 2, "--out", tmp_path / "new")
    assert result.exit_code == 0, "a method that is not searched for keeps nothing, and looks at nothing"
    assert hours.read_text() == "of work"


def test_work_goes_when_it_is_done_or_when_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "new.work"
    with kept(folder, "convert"):
        (folder / "part").mkdir()
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), kept(folder, "convert"):
        raise KeyboardInterrupt
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), kept(folder, "convert"):
        (folder / "part").mkdir()
        raise KeyboardInterrupt
    assert not folder.exists(), "empty folders are no work"
    with pytest.raises(KeyboardInterrupt), kept(folder, "convert"):
        (folder / "part").mkdir()
        (folder / "part" / "file").touch()
        raise KeyboardInterrupt
    require_own(folder, "convert")
    assert (folder / "part" / "file").is_file()
