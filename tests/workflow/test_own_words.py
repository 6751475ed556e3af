"""The original's own words as a kind of text that is measured, beside a training on others of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit import api
from retrofit.checkpoint.provenance import sha256
from retrofit.data import samples
from retrofit.data.measured import scored_documents
from retrofit.data.samples import Teacher
from retrofit.data.texts import read_texts
from retrofit.recipe.schema import TextSource
from retrofit.system.world import World
from tests.ranks import on_ranks
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


def run(world: World, recipe: Path, out: Path, cache: Path) -> set[str]:
    os.environ["RETROFIT_CACHE"] = str(cache)
    samples.sampled_sequences = lambda *_: 8  # several batches
    samples.SAMPLE_TOKENS = 64
    api.run(recipe, out=out, progress=False)
    return {f"{file.parent.name}/{file.name} {sha256(file)}" for file in (cache / "samples").glob("*/*.json")}


@pytest.mark.slow
def test_two_processes_train_on_what_one_would_write(
    recipe: Callable[..., Path], model: Path, texts: Path, tmp_path: Path
) -> None:
    recover = {**sections(model, texts)["recover"], "text": [{"source": "self", "tokens": 1024}], "batch_size": 2}
    path = recipe(context=None, publish=None, evaluate=None, require={}, recover=recover)
    together = on_ranks(tmp_path, 2, run, path, tmp_path / "two", tmp_path / "two-cache")
    (alone,) = on_ranks(tmp_path, 1, run, path, tmp_path / "one", tmp_path / "one-cache")
    assert len(alone) > 2
    assert together == [alone, alone]


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
    rows = json.loads((tmp_path / "run" / "5-evaluate" / "metrics.json").read_text())["models"][0]["rows"]
    assert {row["kind"] for row in rows} == {"self", "held.txt", "all"}
