"""Tasks end to end with lm-evaluation-harness: tasks of our own on a tiny model, beside the harness's own numbers."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import from_file
from retrofit.evaluation.tasks.harness_reader import Prompts
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Evaluate, Tasks
from retrofit.system.world import ALONE, World
from tests.evaluation.own_tasks import QUESTIONS, asked, folder, theirs
from tests.ranks import on_ranks
from tests.workflow.conftest import model, recipe, retrofit, sections, texts

__all__ = ["folder", "model", "recipe", "texts"]  # fixtures

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`; `make test-eval` installs it)")


def test_the_command_gives_the_harness_s_own_numbers(model: Path, texts: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    names = ["own_choice", "own_word", "own_story", "own_both"]
    tasks = [part for name in names for part in ("--task", name)]
    result = retrofit(
        "evaluate", model, "--text", texts / "held.txt", *asked(folder, *tasks), "--fewshot", 2, "--limit", 15,
        "--out", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output + repr(result.exception)
    expected: dict[str, Any] = {}
    for name in names:  # it refuses a task and its group together
        expected |= theirs(model, folder, [name], num_fewshot=2, limit=15)
    rows = {(row["task"], row["metric"]): row for row in json.loads(result.stdout)["tasks"]}
    assert list(rows) == [
        ("own_choice", "acc"), ("own_choice", "acc_norm"), ("own_word", "acc"), ("own_word", "perplexity"),
        ("own_story", "exact_match"), ("own_both", "acc"),
    ]  # fmt: skip
    for (task, metric), row in rows.items():
        assert row["value"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-5)
        if metric != "perplexity":  # a bootstrap
            assert row["stderr"] == pytest.approx(expected[task][f"{metric}_stderr,none"], rel=1e-5)
        assert row["questions"] == (30 if task == "own_both" else 15)
        assert row["fewshot"] == 2
    stored = from_file(tmp_path / "a.tasks.json")
    assert set(stored) == set(names)
    assert len(stored["own_choice"].asked) == 15
    by_metric = {one.metric: one for one in stored["own_word"].scores}
    assert by_metric["perplexity"].questions is None
    assert not by_metric["perplexity"].higher_is_better
    assert len(by_metric["acc"].questions or ()) == 15
    (whole,) = stored["own_both"].scores
    assert whole.questions is not None
    assert len(whole.questions) == 30


def test_a_run_asks_every_model_and_goes_on_after_a_stop(
    recipe: Callable[..., Path], model: Path, texts: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofit.workflow import questions as module

    section = sections(model, texts)["evaluate"]
    own = str(folder / "own_word.yaml")
    evaluate = {
        **section,
        "lengths": [64],
        "cost_lengths": [],
        "tasks": {"names": ["own_choice", own], "folder": str(folder)},
    }
    require = {"task_drop@own_choice": "<= 1", "task@own_word/perplexity": "<= 1e30"}
    path, out = recipe(context=None, recover=None, evaluate=evaluate, require=require), tmp_path / "run"
    plan = json.loads(retrofit("plan", path, "--json").stdout)
    (planned,) = [step for step in plan["steps"] if step["step"] == "evaluate"]
    assert f"{2 * QUESTIONS} questions of own_choice, own_word" in planned["does"]
    assert f"about {5 * QUESTIONS} requests" in planned["does"]
    assert len(planned["piece_seconds"]) == 2

    real, calls = module.ask, itertools.count()

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "ask", stopped)
    assert retrofit("run", path, "--out", out).exit_code == 130
    asked_again: list[str] = []
    monkeypatch.setattr(
        module, "ask", lambda *args, **kwargs: asked_again.append(args[1].name) or real(*args, **kwargs)
    )
    result = retrofit("run", path, "--out", out, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert asked_again == ["own_word"]  # of the converted model

    found = json.loads((out / "5-evaluate" / "metrics.json").read_text())
    scores = {one["label"]: one["tasks"] for one in found["models"]}
    changes = {one["label"]: one["task_changes"] for one in found["models"]}
    assert list(scores) == ["original", "converted"]
    assert changes["original"] == []
    assert [row["metric"] for row in changes["converted"]] == ["acc", "acc_norm", "acc"]
    for label, checkpoint in (("original", model), ("converted", out / "1-convert")):
        expected = theirs(checkpoint, folder, ["own_choice", "own_word"])
        for row in scores[label]:
            assert row["value"] == pytest.approx(expected[row["task"]][f"{row['metric']},none"], rel=1e-5)
    drop = scores["original"][0]["value"] - scores["converted"][0]["value"]
    assert found["metrics"]["task_drop@own_choice"] == pytest.approx(drop)
    (changed, *_) = json.loads(result.stdout)["models"]["converted"]["task_changes"]
    assert changed["drop"] == pytest.approx(drop)
    assert "own_choice" in (out / "report.html").read_text()
    assert "How it answers questions" in (out / "report.md").read_text()
    assert "| own_choice | acc | 24 | 0 |" in (out / "final" / "README.md").read_text()
    assert "task_drop@own_choice" in json.loads((out / "final" / "retrofit.json").read_text())["metrics"]
    (kept, *_) = json.loads(retrofit("compare", out, out, "--json").stdout)["tasks"]
    assert kept["change"] == 0
    assert kept["questions"] == QUESTIONS

    fewer = {**evaluate, "tasks": {**evaluate["tasks"], "limit": 8}}
    recipe(context=None, recover=None, publish=None, evaluate=fewer, require={})
    again = json.loads(retrofit("run", path, "--out", out, "--json").stdout)
    assert "evaluate:original" in again["reused"]
    assert "evaluate:original:own_choice" not in again["reused"]


def test_a_stopped_command_keeps_what_it_asked(
    model: Path, texts: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofit.workflow import questions as module

    real, names = module.ask, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        names.append(args[1].name)
        if names == ["own_choice", "own_word"]:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "ask", interrupted)
    more = asked(folder, "--task", "own_choice", "--task", "own_word", "--out", tmp_path / "a.npz")
    assert retrofit("evaluate", model, "--text", texts / "held.txt", *more).exit_code == 130
    assert not (tmp_path / "a.tasks.json").exists()
    names.clear()
    result = retrofit("evaluate", model, "--text", texts / "held.txt", *more)
    assert result.exit_code == 0
    assert names == ["own_word"]
    assert "own_choice: done before" in result.output
    assert set(from_file(tmp_path / "a.tasks.json")) == {"own_choice", "own_word"}
    assert not (tmp_path / "a.npz.scored").exists()


def refused(**section: Any) -> str:
    from retrofit.evaluation.tasks.harness import open_tasks

    with pytest.raises(UserError) as error:
        open_tasks(Tasks.model_validate(section))
    return str(error.value)


def test_names_and_data_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    said = refused(names=["hellaswagg"])
    assert "knows no task `hellaswagg`" in said
    assert "did you mean `hellaswag`" in said
    assert "there is no task file" in refused(names=[str(tmp_path / "no.yaml")])
    assert "there is no folder" in refused(names=["own_choice"], folder=str(tmp_path / "no"))
    lost = tmp_path / "lost.yaml"
    lost.write_text((folder / "own_word.yaml").read_text().replace(str(folder), str(tmp_path)))
    said = refused(names=[str(lost)])
    assert f"the data of the task `{lost}` cannot be had" in said
    assert "rows.jsonl" in said
    assert "called `own_word`" in refused(names=[str(folder / "own_word.yaml"), "own_word"], folder=str(folder))


def test_a_task_whose_data_are_on_the_hub_is_refused_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert "the data of the task `arc_easy` cannot be had" in refused(names=["arc_easy"])


def test_a_disk_that_fills_is_no_fault_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    assert "the disk is full" in refused(names=["arc_easy"])


def test_what_a_task_takes_is_counted_before_a_model_is_read(folder: Path) -> None:
    from retrofit.evaluation.tasks.harness import open_tasks

    section = Tasks(names=("own_choice", "own_story", "own_both"), folder=str(folder), limit=20, fewshot=1)
    choice, story, both = open_tasks(section).tasks
    assert (choice.questions, choice.requests, choice.generated) == (20, 80, 0)
    assert (story.questions, story.requests, story.generated) == (20, 20, 80)
    assert (both.questions, both.requests, both.metrics) == (40, 100, ("acc", "acc_norm", "perplexity"))
    assert 0 < choice.request_bytes <= choice.longest_bytes
    more = open_tasks(section.model_copy(update={"fewshot": 2})).tasks[0]
    assert more.digest != choice.digest
    assert more.request_bytes > choice.request_bytes


def progress_bars(text: str) -> Iterator[str]:
    yield from (line for line in text.splitlines() if "it/s" in line or "Running" in line)


def test_the_harness_says_nothing_of_its_own(
    model: Path, texts: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = retrofit("evaluate", model, "--text", texts / "held.txt", *asked(folder, "--task", "own_choice"))
    assert result.exit_code == 0
    assert "own_choice" in result.output
    assert not [*progress_bars(result.output), *progress_bars(capfd.readouterr().err)]


def answers(world: World, model: Path, folder: Path, batch_size: int) -> list[Any]:
    """What each task is answered, in this process."""
    from retrofit.evaluation.folders import ready
    from retrofit.evaluation.tasks.harness import ask, open_tasks

    names = ["own_choice", "own_word", "own_story"]
    section = Tasks(names=names, folder=str(folder), batch_size=batch_size)
    harness, source = open_tasks(section), ModelFolder(model)
    loaded, _ = ready(source, Evaluate.model_validate({"lengths": [64]}), "eager", "cpu")
    how: Any = {
        "prompts": Prompts(256),
        "resamples": 0,
        "world": world,
    }  # to resample, the harness starts processes of its own
    return [ask(harness, one, loaded, source.tokenizer, section, **how) for one in harness.tasks]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_requests_are_dealt_out_with_the_answers_of_one_process(
    batch_size: int, model: Path, folder: Path, tmp_path: Path
) -> None:
    alone = answers(ALONE, model, folder, batch_size)
    assert on_ranks(tmp_path, 2, answers, model, folder, batch_size) == [alone, alone]
