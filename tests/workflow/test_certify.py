"""`retrofit certify`: a folder of a single command becomes one that can be published; its weights stay as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from retrofit.checkpoint.provenance import digest
from retrofit.errors import UserError
from retrofit.publishing.verify import require_finished
from tests.workflow.conftest import retrofit

STATED = {"license": "mit", "base_model": "someone/tiny"}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder that `retrofit extend` wrote: 512 positions became 1024."""
    out = tmp_path_factory.mktemp("extended") / "long"
    found = retrofit("extend", model, "--length", 1024, "--out", out)
    assert found.exit_code == 0, found.output
    return out


@pytest.fixture
def folder(extended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extended, tmp_path / "long"))


def certify(folder: Path, texts: Path, *more: object) -> str:
    options = ("--text", texts / "held.txt", "--lengths", "64,256", "--documents", 1, *more)
    found = retrofit("certify", folder, *options)
    assert found.exit_code == 0, found.output + repr(found.exception)
    return found.output


def test_an_extended_folder_alone_can_be_published(folder: Path, texts: Path) -> None:
    before = digest(folder, everything=True)
    with pytest.raises(UserError, match="never loaded again") as caught:
        require_finished(folder, stated=STATED)
    assert caught.value.fix.endswith(f"retrofit certify {folder}")
    said = certify(folder, texts)
    assert f"next: retrofit publish {folder} --repo OWNER/NAME" in said
    assert digest(folder, everything=True) == before
    assert {path.name for path in folder.iterdir()} == {*before, "README.md", "retrofit.json"}
    assert require_finished(folder, stated=STATED).license == "mit"
    record = json.loads((folder / "retrofit.json").read_text())
    assert record["reload"]["passed"]
    assert [step["step"] for step in record["steps"]] == ["extend"]
    assert record["metrics"]["ppl@256"] > 1
    card = (folder / "README.md").read_text()
    assert "Its context length went from 512 to 1,024 tokens" in card
    assert "retrofit run recipe.yaml --model tiny" in card
    assert "The base model is not known" in card


def test_the_same_command_again_replaces_its_own_card(folder: Path, texts: Path) -> None:
    certify(folder, texts)
    first = (folder / "README.md").read_bytes()
    certify(folder, texts)
    assert (folder / "README.md").read_bytes() == first


def test_a_converted_folder_is_compared_with_its_original(model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "mqa"
    written = retrofit("convert", model, "--kv-heads", 1, "--method", "mean", "--out", out)
    assert f"  or: retrofit certify {out} --original {model}" in written.output
    refused = retrofit("certify", out)
    assert refused.exit_code == 2
    assert "--original MODEL" in refused.output
    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    refused = retrofit("certify", out, "--original", other, "--text", texts / "held.txt", "--lengths", 64)
    assert refused.exit_code == 2
    assert "is not the model that this folder was made from" in refused.output
    assert f"give {model.name}" in refused.output
    assert not (out / "README.md").exists()
    certify(out, texts, "--original", model)
    card = (out / "README.md").read_text()
    assert "1 KV head instead of 4; the heads of each group were averaged" in card
    assert "| original | converted | converted / original |" in card
    assert require_finished(out, stated=STATED).files


def test_windows_are_on_the_card(model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reading = ("--calibrate", texts / "train", "--tokens", 1024, "--measured-tokens", 256, "--full-layers", "0,")
    written = retrofit("window", model, "--size", 32, *reading, "--out", out)
    assert written.exit_code == 0, written.output
    certify(out, texts, "--original", model)
    card = " ".join((out / "README.md").read_text().split())
    assert f"# {model.name}-w32" in card
    assert "1 of its 2 layers look back a fixed number of tokens only" in card
    assert "- windows of 32 tokens in layer 1; layer 0 sees everything." in card
    assert "sliding-window-attention" in card
    assert "unchanged" not in card


def test_a_card_of_somebody_else_stays(folder: Path, texts: Path) -> None:
    (folder / "README.md").write_text("mine")
    refused = retrofit("certify", folder)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.output
    assert (folder / "README.md").read_text() == "mine"
    certify(folder, texts, "--overwrite")
    assert "attention-retrofit" in (folder / "README.md").read_text()


def test_another_engine_scores_the_same_documents(folder: Path, texts: Path) -> None:
    said = certify(folder, texts, "--engine", "transformers")
    assert "Other engines, against transformers" in said
    [trial] = json.loads((folder / "retrofit.json").read_text())["engines"]
    assert trial["largest"] <= 1e-4 < trial["control"]
    assert trial["control_name"] == "scaling ignored"
    assert trial["greedy"] == 1
    card = (folder / "README.md").read_text()
    assert "This folder was scored by each of these, in a process of its own" in card
    assert f"| transformers | {trial['version']} |" in card
    assert require_finished(folder, stated=STATED).files


def test_an_engine_that_is_not_there_is_told_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    refused = retrofit("certify", folder, "--engine", "transformers-4.51")
    assert refused.exit_code == 2
    assert "transformers-4.51 is not installed here" in refused.output
    where = tmp_path / "cache" / "engines"
    command = f"retrofit certify {folder} --engine transformers-4.51 --make-environment"
    assert f"let one be made, in {where}: {command}" in " ".join(refused.output.split())
    assert "vllm" in retrofit("certify", folder, "--engine", "torchserve").output


def test_folders_that_cannot_be_certified(folder: Path, model: Path) -> None:
    assert "did not write it" in retrofit("certify", model).output
    (folder / "notes.txt").write_text("x")
    assert "changed, added or removed" in retrofit("certify", folder).output
    assert not (folder / "README.md").exists()
