"""Commands of one step find their own finished result, replace one of this program when told, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from retrofit import api
from retrofit.checkpoint.lock import folder_lock
from retrofit.evaluation import folders
from tests.workflow.conftest import retrofit
from tests.workflow.test_ownership import contents


def refused(*arguments: object, words: str) -> None:
    result = retrofit(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output


def test_an_evaluation_is_found_done_and_replaced_when_told(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "l.npz"
    asked = ("evaluate", model, "--text", texts / "held.txt", "--needle", "256", "--depths", 1, "--out", out, "--json")
    first = retrofit(*asked, "--lengths", "64,300")
    assert first.exit_code == 0, first.output
    with monkeypatch.context() as patch:
        patch.setattr(folders, "score_folder", lambda *_, **__: pytest.fail("it is done"))
        again = retrofit(*asked, "--lengths", "64,300")
    assert again.exit_code == 0, again.output
    assert "done before" in again.stderr
    timeless = [{**json.loads(done.stdout), "cost": None} for done in (first, again)]
    assert timeless[0] == timeless[1]
    kept = contents(tmp_path)
    refused(*asked, "--lengths", "64,128", words="exists already")
    assert contents(tmp_path) == kept
    assert retrofit(*asked, "--lengths", "64,128", "--overwrite").exit_code == 0
    assert contents(tmp_path).keys() == kept.keys()
    assert contents(tmp_path) != kept


@pytest.mark.parametrize("name", ["l.npz", "l.tasks.json"])
def test_an_evaluation_overwrites_no_file_of_somebody_else(name: str, model: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("years of work")
    asked = ("evaluate", model, "--text", texts / "held.txt", "--lengths", "64", "--out", tmp_path / "l.npz")
    refused(*asked, words="exists already")
    assert contents(tmp_path) == {name: b"years of work"}


def test_the_second_of_two_evaluations_into_one_file_is_told(model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "l.npz"
    with folder_lock(out):
        refused("evaluate", model, "--text", texts / "held.txt", "--lengths", "64", "--out", out, words="in use by")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 2 KV heads, written by `convert`."""
    out = tmp_path_factory.mktemp("written") / "out"
    assert retrofit("convert", model, "--method", "mean", "--kv-heads", 2, "--out", out).exit_code == 0
    return out


@pytest.mark.parametrize("command", ["convert", "extend"])
def test_a_checkpoint_is_found_done_and_replaced_when_told(command: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one, other = {
        "convert": (("--method", "mean", "--kv-heads", 2), ("--method", "mean", "--kv-heads", 1)),
        "extend": (("--factor", 2), ("--factor", 4)),
    }[command]
    call: tuple[Any, ...] = (command, model, "--out", out)
    assert retrofit(*call, *one).exit_code == 0
    before = contents(out)
    again = retrofit(*call, *one)
    assert again.exit_code == 0, again.output
    assert "done before" in again.output
    assert contents(out) == before
    refused(*call, *other, words="not empty")
    (out / "model-q8.gguf").write_text("hours of work")
    refused(*call, *other, "--overwrite", words="`model-q8.gguf` in the output folder was not written by this program")
    assert (out / "model-q8.gguf").read_text() == "hours of work"
    (out / "model-q8.gguf").unlink()
    assert retrofit(*call, *other, "--overwrite").exit_code == 0
    assert contents(out) != before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-mine.safetensors", "was not written by this program"),
        ("LICENSE", "was not written by this program"),
        (".notes", "was not written by this program"),
        ("additional_chat_templates/thesis.txt", "was not written by this program"),
        ("vocab.txt/thesis.txt", "was not written by this program"),
        ("config.json", "was changed after this program wrote it"),
        ("model.safetensors", "was changed after this program wrote it"),
    ],
)
def test_what_somebody_added_or_changed_is_not_replaced(
    name: str, words: str, written: Path, model: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(written, tmp_path / "out"))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes((out / name).read_bytes() + b"\n" if (out / name).is_file() else b"years of work")
    before = contents(out)
    refused("convert", model, "--method", "mean", "--kv-heads", 1, "--out", out, "--overwrite", words=words)
    assert contents(out) == before


def test_weights_that_were_changed_are_not_found_done(written: Path, model: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(written, tmp_path / "out"))
    (out / "tokenizer_config.json").write_text("{}")
    again = retrofit("convert", model, "--method", "mean", "--kv-heads", 2, "--out", out)
    assert again.exit_code == 0, "what people edit beside the weights stays"
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    refused(*("convert", model, "--method", "mean", "--kv-heads", 2, "--out", out), words="was changed since")


def test_a_folder_of_somebody_else_is_never_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "retrofit.json").write_text('{"thesis": 1}')
    call = ("convert", model, "--kv-heads", 2, "--method", "mean", "--out", tmp_path / "out", "--overwrite")
    refused(*call, words="not empty")
    assert contents(tmp_path) == {"out/retrofit.json": b'{"thesis": 1}'}


def test_a_recipe_is_copied_over_a_file_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("years of work")
    refused("recipes", "copy", "gqa", tmp_path / "mine.yaml", words="exists already")
    assert contents(tmp_path) == {"mine.yaml": b"years of work"}
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nothing")
    refused("recipes", "copy", "gqa", tmp_path / "link.yaml", words="symbolic link to something that is not there")
    assert api.copy_recipe("gqa", tmp_path / "mine.yaml", overwrite=True).read_text().startswith("#")
    assert not (tmp_path / "nothing").exists()
