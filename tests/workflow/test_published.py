"""`retrofit publish` takes the folder of a run, and its messages name the folder to give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.workflow.journal import Journal
from retrofit.workflow.published import published_folder
from tests.workflow.conftest import retrofit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "x"
    for name in ("final", "4-recover"):
        (folder / name).mkdir(parents=True)
        (folder / name / "retrofit.json").write_text("{}")
    Journal(folder).mark()
    return folder


def test_a_run_stands_for_what_it_publishes(run: Path, tmp_path: Path) -> None:
    assert published_folder(run) == run / "final"
    assert published_folder(run / "final") == run / "final"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "retrofit.json").write_text("{}")
    assert published_folder(tmp_path / "other") == tmp_path / "other"


def test_a_folder_of_somebody_else_is_refused_with_what_can_be_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this program did not write it") as caught:
        published_folder(tmp_path)
    assert "`retrofit certify` completed" in caught.value.fix


def test_a_run_without_something_to_publish_says_how_to_end_it(run: Path) -> None:
    shutil.rmtree(run / "final")
    with pytest.raises(UserError, match="no `final`") as caught:
        published_folder(run)
    assert caught.value.fix.endswith(f"retrofit run {run}")


def test_a_step_of_a_run_names_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(UserError, match="one step of a run") as caught:
        published_folder(Path("runs/x/4-recover"))
    assert caught.value.fix == f"give the folder of the run: {Path('runs/x')}"


def test_what_is_no_folder_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    found = retrofit("publish", tmp_path / "none", "--repo", "me/x")
    assert found.exit_code == 2
    assert "there is no such folder" in found.output
    assert "runs/quickstart" in found.output


def test_a_local_model_of_no_known_source_runs_to_the_end(recipe: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    file = recipe(convert=None, recover=None, context=None, publish={}, require={})
    result = retrofit("run", file, "--out", out, "--set", "evaluate.lengths=[64]")
    assert result.exit_code == 0, result.output
    assert "the base model is not known and is left out of the card" in result.output
    card = (out / "final" / "README.md").read_text()
    assert "The base model is not known" in card
    assert "# tiny\n" in card
    refused = retrofit("publish", out, "--repo", "me/tiny", "--license", "mit")
    assert refused.exit_code == 2
    assert "--base-model ORG/NAME" in refused.output
