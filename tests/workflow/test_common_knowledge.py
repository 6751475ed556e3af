"""The built-in task in a run: asked of every model, kept for itself, in plan, gate, report and card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import from_file
from retrofit.evaluation.tasks.common_knowledge import NAME, CommonKnowledge, ask
from retrofit.evaluation.tasks.harness import Asked, Harness
from retrofit.model.folder import ModelFolder
from retrofit.model.load import load_config
from retrofit.recipe.load import RecipeError, load_recipe
from retrofit.recipe.schema import Recipe
from retrofit.workflow import questions
from retrofit.workflow.plan import make_plan
from tests.tiny import save_tiny
from tests.workflow.conftest import retrofit, sections
from tests.workflow.test_plan import FACTS, SPEED

Write = Callable[..., Path]


def asking(model: Path, texts: Path, asked: bool | int = 8) -> dict[str, Any]:
    section = sections(model, texts)["evaluate"]
    return {**section, "lengths": [64], "cost_lengths": [], "continuation_tokens": 0, "common_knowledge": asked}


def test_a_run_asks_every_model_and_goes_on_after_a_stop(
    recipe: Write, model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require = {f"task_drop@{NAME}": "<= 1", f"task@{NAME}/acc_norm": ">= 0"}
    path = recipe(context=None, recover=None, evaluate=asking(model, texts), require=require)
    out, asked = tmp_path / "run", []
    real = questions.common_knowledge.ask

    def stopped(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[0].name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(questions.common_knowledge, "ask", stopped)
    assert retrofit("run", path, "--out", out).exit_code == 130
    result = retrofit("run", path, "--out", out, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert len(asked) == 3, "what the original answered is kept"

    found = json.loads((out / "5-evaluate" / "metrics.json").read_text())
    original, converted = found["models"]
    for stored, folder in ((original, model), (converted, out / "1-convert")):
        loaded = ModelFolder(folder)
        expected = ask(CommonKnowledge.of(8), loaded.load(dtype="float32", device="cpu"), loaded.tokenizer)
        assert stored["tasks"][0]["value"] == expected.scores[0].value
        assert stored["tasks"][0]["chance"] == 0.25
    drop = original["tasks"][0]["value"] - converted["tasks"][0]["value"]
    assert found["metrics"][f"task_drop@{NAME}"] == pytest.approx(drop)
    assert converted["task_changes"][0]["questions"] == 8
    assert "of 8 common-knowledge questions" in (out / "report.md").read_text()
    assert "common-knowledge questions" in (out / "final" / "README.md").read_text()
    assert f"task_drop@{NAME}" in json.loads((out / "final" / "retrofit.json").read_text())["metrics"]
    (kept,) = json.loads(retrofit("compare", out, out, "--json").stdout)["tasks"]
    assert kept["change"] == 0


def test_the_command_asks_and_compares(model: Path, texts: Path, tmp_path: Path) -> None:
    import retrofit as package

    for name in ("a", "b"):
        found = package.evaluate(
            model, text=[str(texts / "held.txt")], lengths=[64], common_knowledge=8, out=tmp_path / f"{name}.npz"
        )
        assert [(row.task, row.questions) for row in found.tasks] == [(NAME, 8)]
    assert set(from_file(tmp_path / "a.tasks.json")) == {NAME}
    (row,) = package.compare(tmp_path / "a.npz", tmp_path / "b.npz").tasks
    assert (row.questions, row.change) == (8, 0)


def test_a_plan_counts_it(recipe: Write, model: Path, texts: Path) -> None:
    plain, counted = (
        json.loads(retrofit("plan", recipe(evaluate=asking(model, texts, asked)), "--json").stdout)["steps"][-2]
        for asked in (False, True)
    )
    assert "504 questions of common_knowledge" in counted["does"]
    assert counted["seconds"] > plain["seconds"]
    assert counted["task_seconds"][NAME] > 0
    assert counted["peak_bytes"] == plain["peak_bytes"]


def test_the_bundled_recipes_ask_it() -> None:
    for name in (
        "quickstart",
        "quickstart-full",
        "gqa",
        "mqa",
        "gqa-long",
        "extend-4x",
        "extend-long",
        "kernel-only",
        "window",
    ):
        section = load_recipe(name).evaluate
        assert section
        assert section.common_knowledge is True, name


def test_on_a_small_model_it_takes_seconds() -> None:
    recipe = load_recipe("quickstart")
    plan = make_plan(recipe, FACTS, SPEED, questions.sizes(recipe.evaluate, None))
    assert (plan.seconds_of(f"evaluate:original:{NAME}") or 1e9) < 40


@pytest.mark.parametrize("asked", [0, 3, 6, 508, -4, "some", 4.0, None])
def test_what_are_no_whole_fours_is_refused(tmp_path: Path, asked: object) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "evaluate": {"common_knowledge": asked}}))
    with pytest.raises(RecipeError, match="common_knowledge: must be true, false, or a multiple of 4 up to 504"):
        load_recipe(tmp_path / "r.yaml")


def checked(model: Path, harness: Harness | None = None, **require: str) -> None:
    recipe = Recipe.model_validate({"name": "r", "evaluate": {"common_knowledge": True}, "require": require})
    questions.check_tasks(recipe, harness, load_config(model), "blockwise")


def test_requirements_are_on_what_is_asked(model: Path) -> None:
    checked(model, **{f"task_drop@{NAME}": "<= 0.1", f"task@{NAME}/acc_norm": ">= 0.4"})
    with pytest.raises(UserError, match="no task `arc_easy` is asked"):
        checked(model, **{"task@arc_easy": ">= 0.1"})
    with pytest.raises(UserError, match="has no metric `acc`"):
        checked(model, **{f"task@{NAME}/acc": ">= 0.1"})


def test_another_task_by_its_name_is_refused(model: Path) -> None:
    other = Asked(NAME, NAME, (), 1, 1, 1.0, 1, 0, ("acc",), "digest")
    with pytest.raises(UserError, match="name of a task that is built in"):
        checked(model, Harness(None, (other,), "0.4.13"))


def test_learned_positions_that_end_too_early_are_refused_before_any_work(texts: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "short", "gpt_bigcode", max_position_embeddings=64)
    refused = retrofit(
        "evaluate", folder, "--text", texts / "held.txt", "--lengths", 64, "--common-knowledge",
        "--out", tmp_path / "a.npz",
    )  # fmt: skip
    assert refused.exit_code == 2
    assert "--common-knowledge" in refused.output
    assert not (tmp_path / "a.npz").exists()
