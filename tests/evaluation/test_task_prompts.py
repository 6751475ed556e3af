"""Prompts of tasks: as turns of a dialogue, and those that a context does not hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.evaluation.tasks.answers import from_file
from retrofit.evaluation.tasks.harness_reader import Prompts
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Evaluate, Tasks
from tests.dialogues import CHATML
from tests.evaluation.own_tasks import WORDS, asked, folder, theirs
from tests.tiny import save_tiny
from tests.workflow.conftest import model, recipe, retrofit, sections, texts

__all__ = ["folder", "model", "recipe", "texts"]  # fixtures

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`; `make test-eval` installs it)")


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("instruct") / "tiny")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def test_questions_as_turns_of_a_dialogue_are_those_of_the_harness(
    instruct: Path, texts: Path, folder: Path, tmp_path: Path
) -> None:
    more = asked(folder, "--task", "own_choice", "--fewshot", 2, "--limit", 9, "--out", tmp_path / "a.npz")
    chat = ("--apply-chat-template", "--system-instruction", "Answer in a word.", "--log-samples")
    result = retrofit("evaluate", instruct, "--text", texts / "held.txt", *more, *chat, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    how = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Answer in a word."}
    expected = theirs(instruct, folder, ["own_choice"], num_fewshot=2, limit=9, **how)["own_choice"]
    for row in json.loads(result.stdout)["tasks"]:
        assert row["value"] == pytest.approx(expected[f"{row['metric']},none"], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "a.tasks.samples.jsonl").read_text("ascii").splitlines()]
    assert [line["question"] for line in lines] == list(range(9))
    prompt = lines[0]["prompts"][0][0]
    assert prompt.startswith("<|im_start|>system\nAnswer in a word.<|im_end|>\n<|im_start|>user\nNumber ")
    assert prompt.count("<|im_start|>assistant\n") == 3
    stored = from_file(tmp_path / "a.tasks.json")["own_choice"]
    assert [line["asked"] for line in lines] == list(stored.asked)
    values = stored.scores[0].questions
    assert tuple(line["metrics"]["acc"] for line in lines) == values
    again = retrofit("evaluate", instruct, "--text", texts / "held.txt", *more, *chat)
    assert again.exit_code == 0
    assert "done before" in again.output


def test_a_dialogue_in_one_turn_is_another_question(instruct: Path, folder: Path) -> None:
    from retrofit.evaluation.folders import ready
    from retrofit.evaluation.tasks.harness import ask, open_tasks

    source = ModelFolder(instruct)
    loaded, _ = ready(source, Evaluate.model_validate({"lengths": [64]}), "eager", "cpu")
    found = []
    for multiturn in (True, False):
        how = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "fewshot": 1, "limit": 2}
        section = Tasks(names=("own_choice",), folder=str(folder), **how)  # type: ignore[arg-type]
        harness = open_tasks(section)
        found.append(ask(harness, harness.tasks[0], loaded, source.tokenizer, section, prompts=Prompts(512)))
    assert not set(found[0].asked) & set(found[1].asked)


def test_what_a_chat_template_cannot_write_is_refused_before_any_work(
    model: Path, texts: Path, folder: Path, instruct: Path, tmp_path: Path
) -> None:
    from shutil import copytree

    more = ("--text", texts / "held.txt", *asked(folder, "--task", "own_choice", "--apply-chat-template"))
    refused_here = retrofit("evaluate", model, *more)
    assert refused_here.exit_code == 2
    assert "no chat template" in refused_here.output
    forgets = Path(copytree(instruct, tmp_path / "forgets"))
    (forgets / "chat_template.jinja").write_text(CHATML.replace("in messages", "in messages if m['role'] != 'system'"))
    system = retrofit("evaluate", forgets, *more, "--system-instruction", "Answer in a word.")
    assert system.exit_code == 2
    assert "leaves out" in system.output
    kept = retrofit("evaluate", instruct, *more, "--log-samples")
    assert kept.exit_code == 2
    assert "--out FILE.npz" in kept.output


def test_the_original_is_not_asked_prompts_that_its_window_does_not_hold(
    recipe: Callable[..., Path], model: Path, texts: Path, tmp_path: Path
) -> None:
    """512 positions become 1,024; one prompt of four has more than 512 tokens."""
    rows = [{"question": f"Number {i} is", "word": WORDS[i % 4]} for i in range(4)]
    rows[1]["question"] = "the model reads a long text " * 22 + rows[1]["question"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        "task: own_long\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'test_split: test\ndoc_to_text: "{{question}}"\noutput_type: loglikelihood\ndoc_to_target: " {{word}}"\n'
        "metric_list: [{metric: acc}]\nmetadata: {version: 1}\n"
    )
    section = sections(model, texts)["evaluate"]
    tasks = {"names": [str(tmp_path / "task.yaml")], "log_samples": True}
    evaluate = {**section, "lengths": [64], "cost_lengths": [], "tasks": tasks}
    out = tmp_path / "run"
    result = retrofit("run", recipe(recover=None, evaluate=evaluate, require={}), "--out", out)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "original was not asked 1 questions of own_long" in result.output
    original, converted = json.loads((out / "5-evaluate" / "metrics.json").read_text())["models"]
    assert original["not_asked"] == {"own_long": 1}
    assert [(row["metric"], row["questions"]) for row in original["tasks"]] == [("acc", 3)]
    assert converted["not_asked"] == {}
    assert [row["questions"] for row in converted["tasks"]] == [4]
    assert [(row["metric"], row["questions"]) for row in converted["task_changes"]] == [("acc", 3)]
    assert "| 3 (1 not asked) |" in (out / "report.md").read_text()
    assert "(without 1 that its context does not hold)" in (out / "final" / "README.md").read_text()
    logs = {
        label: (out / "tasks" / label / "own_long.samples.jsonl").read_text().splitlines()
        for label in ("original", "converted")
    }
    assert [len(lines) for lines in logs.values()] == [3, 4]
    assert all(json.loads(line)["cut_to"] is None for line in logs["converted"])
