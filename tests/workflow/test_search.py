"""`method: search` as a user meets it: on the command line, in a recipe, and after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.console import Silent
from retrofit.context import rope
from retrofit.data.samples import Teacher
from retrofit.data.search_text import searched_text
from retrofit.model.load import load_config, load_tokenizer
from retrofit.recipe.schema import Search, TextSource
from tests.workflow.conftest import retrofit, sentences


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(sentences(5, 400))
    return path


def test_a_window_is_searched_for_and_the_search_is_on_record(model: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "long"
    result = retrofit("extend", model, "--factor", 2, "--method", "search", "--text", book, "--out", out)
    assert result.exit_code == 0, result.output
    assert "yarn" in result.stdout
    assert "objective" in result.stdout
    assert not out.with_name("long.work").exists()
    (step,) = json.loads((out / "retrofit.json").read_text())["steps"]
    found = step["result"]["search"]
    assert step["result"]["method"] == found["method"] == found["winner"]["method"]
    assert found["winner"]["objective"] <= found["reference"]["objective"]
    assert found["text"] == "book.txt"
    assert {trial["tokens"] for trial in found["trials"]} == {256, 1024}
    config = load_config(out)
    assert config.max_position_embeddings == 1024
    theta = found["winner"]["settings"].get("theta")
    if theta:
        assert config.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "search", "--tokens", 1000), "at least"),
        (("--method", "ntk", "--tokens", 10000), "`method: search` only"),
        (("--method", "search", "--text", "no-such-file.txt"), "no-such-file.txt"),
        (("--method", "serach"), "search"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(
    model: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    result = retrofit("extend", model, "--factor", 2, *options, "--out", tmp_path / "long")
    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())


def test_a_run_searches_once_and_plans_it(
    recipe: Callable[..., Path], book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(
        convert=None,
        recover=None,
        context={"factor": 2, "method": "search", "search": {"tokens": 6144, "text": [str(book)]}},
    )
    plan = json.loads(retrofit("plan", file, "--json").stdout)
    (step,) = [step for step in plan["steps"] if step["step"] == "extend"]
    assert "12 x 256, 3 x 1,024" in step["does"]

    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rope, "write_extended", stopped)
        retrofit("run", file, "--out", tmp_path / "run")
    kept = tmp_path / "run" / "3-extend.work"
    trials = len(list(kept.rglob("*.npy")))
    assert trials == 12 + 3 + 2  # and the model before, once a rung
    result = retrofit("run", file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert not kept.exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_short_documents_are_packed_and_read_again_and_that_is_said(model: Path, tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(sentences(index, 5))
    progress = Silent()
    tokenizer = load_tokenizer(model)
    section = Search(text=tuple(TextSource(source=str(tmp_path / f"{index}.txt")) for index in range(3)))
    ids, name = searched_text(section, tokenizer, 1024, seed=0, teacher=Teacher(model), progress=progress)
    assert len(ids) == 1024
    assert "packed from several documents" in name
    assert "more than once" in name
    assert any("it is read" in note for note in progress.notes)
