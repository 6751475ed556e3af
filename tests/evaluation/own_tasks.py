"""Tasks of our own on one file of questions, and what lm-evaluation-harness itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QUESTIONS = 24
WORDS = ("red", "blue", "yellow", "green")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on one file of questions: a choice, the likelihood of a last word, a generated word."""
    path = tmp_path_factory.mktemp("own-tasks")
    rows = [
        {"question": f"Number {i} is", "choices": list(WORDS), "answer": (7 * i) % 4, "word": WORDS[(7 * i) % 4]}
        for i in range(QUESTIONS)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {path / 'rows.jsonl'}, test: {path / 'rows.jsonl'}}}}}\n"
        'test_split: test\nfewshot_split: train\ndoc_to_text: "{{question}}"\n'
    )
    choice = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
    choice += "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    word = 'output_type: loglikelihood\ndoc_to_target: " {{word}}"\n'
    word += "metric_list: [{metric: acc}, {metric: perplexity}]\n"
    story = 'output_type: generate_until\ndoc_to_target: "{{word}}"\n'
    story += "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    for name, rest in (("own_choice", choice), ("own_word", word), ("own_story", story)):
        (path / f"{name}.yaml").write_text(f"task: {name}\n{data}{rest}metadata: {{version: 3}}\n")
    (path / "both.yaml").write_text(
        "group: own_both\ntask: [own_choice, own_word]\naggregate_metric_list: [{metric: acc}]\n"
    )
    return path


def theirs(model: Path, folder: Path, names: list[str], **how: Any) -> dict[str, Any]:
    """The harness on a folder that it loads itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32", "max_length": 512},
        tasks=names,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **how,
    )
    assert found is not None
    return found["results"]


def asked(folder: Path, *more: object) -> list[object]:
    return ["--lengths", 64, "--task-folder", folder, *more]
