"""The original's own words as a kind of text that is measured, beside a training on others of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.data.measured import scored_documents
from retrofit.data.samples import Teacher
from retrofit.data.texts import read_texts
from retrofit.recipe.schema import TextSource
from tests.tiny import tiny_tokenizer
from tests.workflow.conftest import retrofit, sections

OWN = TextSource(source="self")


def test_what_is_measured_of_them_is_not_trained_on(model: Path) -> None:
    teacher = Teacher(model)
    train = {text.text for text in read_texts(OWN, split="train", teacher=teacher)}
    found = scored_documents([OWN], tiny_tokenizer(), length=64, count=2, trained_on=[OWN], teacher=teacher)
    held_out = {text.text for text in read_texts(OWN, split="held_out", teacher=teacher)}
    assert len(found) == 2
    assert train.isdisjoint(held_out)
    starts = {tiny_tokenizer().decode(document.input_ids[1:]) for document in found}
    assert all(any(text.startswith(start) for text in held_out) for start in starts)


@pytest.mark.slow
def test_a_run_measures_them_beside_other_text(
    recipe: Callable[..., Path], model: Path, texts: Path, tmp_path: Path
) -> None:
    made = sections(model, texts)
    evaluate = {**made["evaluate"], "lengths": [64], "text": ["self", str(texts / "held.txt")], "cost_lengths": []}
    recover = {**made["recover"], "text": ["self"]}
    path = recipe(context=None, recover=recover, evaluate=evaluate)
    result = retrofit("run", path, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows = json.loads((tmp_path / "run" / "4-evaluate" / "metrics.json").read_text())["models"][0]["rows"]
    assert {row["kind"] for row in rows} == {"self", "held.txt", "all"}
