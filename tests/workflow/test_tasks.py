"""Tasks in recipes, plans, requirements and comparisons, as far as lm-evaluation-harness is not needed for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import to_file
from retrofit.evaluation.tasks.harness import Asked, Harness
from retrofit.install import install_command
from retrofit.model.load import load_config
from retrofit.recipe.load import load_recipe
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.schema import Recipe
from retrofit.workflow.compare import compare_stored, stored_answers
from retrofit.workflow.estimate.cost import CALL_SECONDS, EFFICIENCY, TaskSize
from retrofit.workflow.journal import Entry, Journal, digests_of
from retrofit.workflow.plan import make_plan
from retrofit.workflow.questions import check_tasks
from tests.evaluation.test_answers import answers
from tests.evaluation.test_perplexity import made_up
from tests.workflow.conftest import retrofit, sections
from tests.workflow.test_compare import save
from tests.workflow.test_plan import FACTS, SPEED


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "lm_eval" else real(name, *more))


def asking(model: Path, texts: Path, **tasks: object) -> dict[str, Any]:
    """The section `evaluate` with tasks."""
    return {**sections(model, texts)["evaluate"], "tasks": {"names": ["arc_easy"], **tasks}}


@pytest.mark.usefixtures("missing")
def test_without_the_harness_nothing_is_begun(
    recipe: Callable[..., Path], model: Path, texts: Path, tmp_path: Path
) -> None:
    file, out = recipe(evaluate=asking(model, texts)), tmp_path / "run"
    for arguments in (
        ("run", file, "--out", out),
        ("plan", file),
        ("evaluate", model, "--text", texts / "held.txt", "--lengths", 64, "--task", "arc_easy"),
    ):
        refused = retrofit(*arguments)
        assert refused.exit_code == 2, refused.output
        assert "which is not installed" in refused.output
        assert install_command(extra="eval") in refused.output
    assert not out.exists()


def test_an_old_harness_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.evaluation.tasks import harness

    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.9")
    with pytest.raises(UserError, match=r"0\.4\.9 is older than 0\.4\.12"):
        harness.require_harness()
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.0rc1")
    assert harness.require_harness() == "0.5.0rc1"


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        ({}, "is required"),
        ({"names": []}, "at least 1"),
        ({"names": ["a"], "limit": 0}, "at least 1"),
        ({"names": ["a"], "shots": 2}, "did you mean `fewshot`"),
    ],
)
def test_a_section_that_is_not_one_is_refused(tmp_path: Path, tasks: dict[str, object], why: str) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "evaluate": {"tasks": tasks}}))
    with pytest.raises(RecipeError, match=why):
        load_recipe(tmp_path / "r.yaml")


def test_options_of_tasks_need_a_task(model: Path) -> None:
    refused = retrofit("evaluate", model, "--fewshot", 2)
    assert refused.exit_code == 2
    assert "--fewshot" in refused.output
    assert "add --task TEXT" in refused.output


def test_requirements_on_tasks(recipe: Callable[..., Path], tmp_path: Path) -> None:
    refused = retrofit("run", recipe(require={"task_drop@arc_easy": "<= 0.02"}), "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "no task is asked" in refused.output
    with pytest.raises(RecipeError, match="is not a metric"):
        load_recipe(recipe(require={"task_drop": "<= 0.02"}))


QUIZ = Asked("quiz", "quiz", (), 100, 400, 40.0, 80, 0, ("acc", "acc_norm"), "digest")
STORY = replace(QUIZ, name="story", given="story", generated=6400, metrics=("exact_match",))


def checked(model: Path, *, batch_size: int = 1, kernel: str = "blockwise", **require: str) -> None:
    tasks = {"names": ["quiz", "story"], "batch_size": batch_size}
    recipe = Recipe.model_validate({"name": "r", "evaluate": {"tasks": tasks}, "require": require})
    check_tasks(recipe, Harness(None, (QUIZ, STORY), "0.4.13"), load_config(model), kernel)


def test_what_would_fail_after_the_work_is_told_before(model: Path) -> None:
    checked(model, **{"task_drop@quiz": "<= 0.1", "task@story/exact_match,strict-match": ">= 0.1"})
    checked(model, batch_size=4, kernel="sdpa")
    with pytest.raises(UserError, match="no task `quizz` is asked"):
        checked(model, **{"task@quizz": ">= 0.1"})
    with pytest.raises(UserError, match="has no metric `f1`"):
        checked(model, **{"task@quiz/f1": ">= 0.1"})
    with pytest.raises(UserError, match="cannot read padding"):
        checked(model, batch_size=4)


def test_tasks_are_priced_for_every_model() -> None:
    recipe = load_recipe(
        "quickstart", ["evaluate.lengths=[1000]", "evaluate.cost_lengths=[]", "evaluate.intermediate=true"]
    )
    size = TaskSize("quiz", 100, 400, 160.0, 400, 0)
    before, plan = make_plan(recipe, FACTS, SPEED), make_plan(recipe, FACTS, SPEED, [size])
    cost = plan.of("evaluate")
    assert cost is not None
    assert len(cost.piece_seconds) == 3
    assert "100 questions of quiz" in cost.does
    tokens = 400 * 40  # four bytes a token
    reading = tokens * (2 * 134_515_008 + 30 * 4 * 9 * 64 * 40 / 2) / (100e9 * EFFICIENCY)
    cache = 40 * 2 * 3 * 64 * 2 * 30
    calls = 400 * ((FACTS.weight_bytes + cache) / SPEED.bytes_per_second + 30 * CALL_SECONDS)
    assert plan.seconds_of("evaluate:recovered:quiz") == pytest.approx(reading + calls)
    assert plan.seconds - before.seconds == pytest.approx(3 * (reading + calls))
    for name in ("evaluate", "evaluate:original"):
        assert plan.seconds_of(name) == pytest.approx(before.seconds_of(name))
    slow = make_plan(recipe, FACTS, SPEED, [replace(size, making=19.0)]).of("evaluate")
    assert slow is not None
    assert slow.seconds == cost.seconds, "it is no part of the step"
    assert "makes all prompts of some, whatever `limit` says: quiz 19 s" in slow.does
    longer = make_plan(recipe, FACTS, SPEED, [replace(size, generated=400)])
    assert longer.seconds_of("evaluate:original:quiz") == pytest.approx(reading + 2 * calls)


def test_stored_answers_are_compared_beside_the_losses(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.npz", made_up(2, 256)), save(tmp_path / "b.npz", made_up(2, 256))
    assert compare_stored(a, b).tasks == ()
    to_file({"quiz": answers([1, 1, 0, 1]), "other": answers([1], name="other")}, tmp_path / "a.tasks.json")
    to_file({"quiz": answers([1, 0, 0, 0]), "mine": answers([1], name="mine")}, tmp_path / "b.tasks.json")
    (row,) = compare_stored(a, b).tasks
    assert (row.task, row.before, row.after, row.lost, row.gained) == ("quiz", 0.75, 0.25, 2, 0)
    assert compare_stored(a, b, bits=True).tasks == (row,)
    shown = " ".join(retrofit("compare", a, b).output.split())
    assert "quiz" in shown
    assert "-0.5000" in shown
    to_file({"quiz": answers([1, 1], first=9)}, tmp_path / "b.tasks.json")
    found = compare_stored(a, b)
    assert found.tasks == ()
    assert "no question alike" in found.notes[-1]


def test_answers_of_a_run_are_those_it_recorded(tmp_path: Path) -> None:
    run, losses = tmp_path / "run", tmp_path / "run" / "losses" / "converted.npz"
    file = run / "tasks" / "converted" / "quiz.json"
    to_file({"quiz": answers([1, 0])}, file)
    journal = Journal(run)

    def entry(step: str, artifact: str) -> Entry:
        return Entry(step, step, artifact, digests_of(run, [run / artifact]))

    journal.append(entry("evaluate:converted:quiz", "tasks/converted/quiz.json"))
    assert stored_answers(run, losses) == {"quiz": answers([1, 0])}
    (run / "1-convert").mkdir()
    (run / "1-convert" / "config.json").write_text("{}")
    journal.append(entry("convert", "1-convert"))
    with pytest.raises(UserError, match="`convert` was done again"):
        stored_answers(run, losses)
    to_file({"quiz": answers([1, 1])}, file)
    with pytest.raises(UserError, match="not those that the run recorded"):
        stored_answers(run, losses)
