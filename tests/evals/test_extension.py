"""The benchmark of a longer window: the command that it records, what it says of the model, and plain YaRN."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import retrofit
from evals.benchmarks import extension
from retrofit.console import PlainProgress
from retrofit.errors import UserError
from retrofit.recipe.load import load_recipe
from retrofit.recipe.schema import Recipe
from tests.tiny import save_tiny

RECIPE = """
name: tiny
context: {factor: 2, method: linear}
recover: {tokens: 128, sequence_length: 32, loss: lm, text: [{source: TEXT}], eval_tokens: 64, adapter: {rank: 2}}
evaluate: {lengths: [32, 128], text: [{source: MEASURED}], documents: 1, tail: 16, resamples: 100, cost_lengths: []}
publish: null
require: {"ppl@32": "<= 1"}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """(model, recipe): a window of 64 positions, and a recipe that doubles it and requires what it will not reach."""
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / f"text/{number}.txt").write_text(f"{number} is a number, and so is {number}{number}. " * 40)
    (tmp_path / "measured.txt").write_text("Nobody has read this, and nobody will. " * 40)
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("TEXT", str(tmp_path / "text")).replace("MEASURED", str(tmp_path / "measured.txt")))
    return save_tiny(tmp_path / "tiny-llama", max_position_embeddings=64), file


def test_what_is_recorded_comes_from_the_run(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = tiny
    books = [tmp_path / "a book.txt", tmp_path / "b.txt"]
    for book in books:
        book.write_text(f"{book.name} tells the story of a whale. " * 40)
    arguments = ["--model", str(model), "--recipe", str(recipe), "--work", str(tmp_path / "work")]
    arguments += ["--set", "seed=1", "--set", "evaluate.chunk=64", "--text", str(books[0]), "--text", str(books[1])]
    monkeypatch.setattr("sys.argv", ["extension", "--out", str(tmp_path / "out"), *arguments])
    extension.main()
    record = json.loads((tmp_path / "out/extension.json").read_text())
    assert record["command"].endswith(
        f"extension --model {model} --recipe {recipe} --set seed=1 --set evaluate.chunk=64 "
        "--text 'a book.txt' --text b.txt"
    )
    text = (tmp_path / "out/extension.md").read_text()
    assert text.startswith("# A window 2 times as long\n")
    assert "tiny-llama, 64 to 128 positions" in text
    assert "| YaRN |" in text
    assert "SmolLM2" not in text
    done = json.loads(next((tmp_path / "work/yarn-run").glob("*-evaluate/metrics.json")).read_text())
    assert [model["label"] for model in done["models"]] == ["original", "extended"]
    assert record["models"]["yarn"]["rows"] == done["models"][1]["rows"]
    assert record["models"]["yarn"]["rows"] != record["models"]["extended"]["rows"]
    assert {row["kind"] for row in record["models"]["yarn"]["rows"]} >= {"measured.txt", "a-book.txt", "b.txt"}


def test_yarn_is_the_recipe_without_its_training(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Recipe] = []

    def run(recipe: Recipe, *, out: Path, progress: Any) -> None:
        runs.append(recipe)
        for step in ("5-evaluate", "losses"):
            (out / step).mkdir(parents=True, exist_ok=True)
        (out / "5-evaluate/metrics.json").write_text('{"models": [{"label": "extended", "rows": [3]}]}')

    digests = {"run": "same", "yarn-run": "same"}

    class Losses:
        def __init__(self, path: Path) -> None:
            self.meta = {"documents_sha256": digests[path.parents[1].name]}

        load = classmethod(lambda cls, path: cls(path))

    monkeypatch.setattr(retrofit, "run", run, raising=False)
    monkeypatch.setattr(extension, "TokenLosses", Losses)
    recipe = load_recipe(tiny[1], ["evaluate.dtype=float32"], model=str(tiny[0]))
    progress = PlainProgress(io.StringIO())
    assert extension._yarn(recipe, tmp_path, progress) == {"label": "extended", "rows": [3]}
    (plain,) = runs
    assert plain.context
    assert (plain.context.method, plain.context.factor) == ("yarn", 2)
    assert plain.evaluate == recipe.evaluate
    assert plain.recover is plain.publish is None
    assert plain.require == {}
    digests["yarn-run"] = "other"
    with pytest.raises(UserError, match="other documents"):
        extension._yarn(recipe, tmp_path, progress)
