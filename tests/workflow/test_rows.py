"""Rows of a training step that a recipe leaves open."""

from __future__ import annotations

from pathlib import Path

import pytest

import retrofit
from retrofit import surgery
from retrofit.checkpoint.provenance import write_provenance
from retrofit.errors import UserError
from retrofit.recipe.load import load_recipe
from retrofit.recipe.schema import Recipe, Recover
from retrofit.system.work_folder import kept
from retrofit.workflow.journal import Journal, begun_rows
from retrofit.workflow.outputs import work_folder
from retrofit.workflow.rows import begun_alone, default_rows, with_rows


def recipe(**recover: object) -> Recipe:
    return Recipe(name="mine", recover=Recover.model_validate({"sequence_length": "1/2x", **recover}))


def rows(found: Recipe) -> int:
    assert found.recover is not None
    return found.recover.batch_size


def test_every_process_gets_a_row_and_a_note_says_so() -> None:
    found, notes = with_rows(recipe(), 8)
    assert rows(found) == 8
    assert notes == ("recover.batch_size: 8, a row for each process",)
    assert found.recover == recipe(batch_size=8).recover, "and nothing else changes"


def test_one_process_a_number_that_is_given_and_a_recipe_without_a_training_stay() -> None:
    for one in (recipe(batch_size=1), recipe(batch_size=4), Recipe(name="mine"), load_recipe("gqa")):
        assert with_rows(one, 8) == (one, ())
    assert with_rows(recipe(), 1) == (recipe(), ())


def test_processes_that_share_rows_count_once() -> None:
    assert default_rows(recipe(distribute={"sequence": 4}), 8) == 2


def test_a_run_keeps_what_it_was_begun_with(tmp_path: Path) -> None:
    assert begun_rows(tmp_path) is None
    Journal(tmp_path).mark(8)
    for processes in (1, 2, 16):
        found, notes = with_rows(recipe(), processes, begun_rows(tmp_path))
        assert rows(found) == 8
        assert notes == ("recover.batch_size: 8, with which the training was begun",)


def test_a_run_that_one_process_began_has_rows_of_one(tmp_path: Path) -> None:
    Journal(tmp_path).mark()
    assert with_rows(recipe(), 8, begun_rows(tmp_path)) == (recipe(), ())


def test_tokens_that_do_not_suffice_for_a_step_are_told() -> None:
    with pytest.raises(UserError, match="one step reads 8192") as caught:
        with_rows(recipe(tokens=4096, sequence_length=1024), 8)
    assert "batch_size: 8" in str(caught.value)


def test_the_command_alone_names_its_option(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="1 row for 8 processes") as caught:
        retrofit.recover(model, teacher=model, batch_size=1, out=tmp_path / "out")
    assert caught.value.where == "--batch-size"
    assert str(caught.value.fix).startswith("use --batch-size 8 or more")


def test_the_command_alone_has_a_row_for_each_process(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    found: list[Recipe] = []

    def written(verb: str, recipe: Recipe, *_: object, notes: tuple[str, ...], **options: object) -> None:
        found.append(recipe)
        assert notes == ("--batch-size 8, a row for each process",)

    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(surgery, "_written", written)
    retrofit.recover(model, teacher=model, out=tmp_path / "out")
    assert rows(found[0]) == 8
    with pytest.raises(UserError, match="one step reads 8192"):
        retrofit.recover(model, teacher=model, tokens=4096, sequence_length=1024, out=tmp_path / "out")


def test_the_command_alone_keeps_what_it_was_begun_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert begun_alone(out) is None
    with pytest.raises(KeyboardInterrupt), kept(work_folder(out), "recover", "8") as work:
        (work / "weights").touch()
        assert begun_alone(out) == 8
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), kept(work_folder(out), "recover", "2"):
        raise KeyboardInterrupt
    assert begun_alone(out) == 8, "the first call's"
    with kept(work_folder(out), "recover"):
        pass
    assert begun_alone(out) is None
    out.mkdir()
    write_provenance(out, {"steps": [{"step": "recover", "config": {"batch_size": 4}, "result": {}}]})
    assert begun_alone(out) == 4
    assert begun_alone(out, overwrite=True) is None
    write_provenance(out, {"steps": [{"step": "convert", "config": {}, "result": {}}]})
    assert begun_alone(out) is None


def test_a_plan_has_a_row_for_each_gpu(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nrecover: {sequence_length: 256}\nevaluate: null\npublish: null\n")
    plan = retrofit.plan(tmp_path / "mine.yaml", model=model, gpu="h100", gpus=8, progress=False)
    assert "steps of 2,048" in plan.steps[0].does
