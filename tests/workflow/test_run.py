"""A whole run on a tiny model: what it leaves, what it does not do twice, and what a changed recipe repeats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from retrofit.checkpoint.provenance import sha256
from retrofit.errors import UserError
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.kernels import check
from retrofit.recipe.load import load_recipe
from tests.workflow.conftest import retrofit, sections

Recipe = Callable[..., Path]
PIECES = ["convert", "extend", "recover", "evaluate:original", "evaluate:converted", "evaluate:recovered", "evaluate"]
NO_PUBLISH = ("--set", "publish=null")


def run(*arguments: object) -> SimpleNamespace:
    result = retrofit("run", *arguments, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return SimpleNamespace(**json.loads(result.stdout), log=result.stderr)


def journal(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path) -> SimpleNamespace:
    """One whole run, shared by the tests below; those that change it work on a copy."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(sections(model, texts)))
    result = run(recipe, "--out", folder / "out")
    return SimpleNamespace(recipe=recipe, folder=folder / "out", result=result)


@pytest.fixture
def copy(done: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(done.folder, tmp_path / "out"))


def test_the_run_folder_holds_what_the_design_says(done: SimpleNamespace) -> None:
    names = {path.name for path in done.folder.iterdir()}
    steps = {"1-convert", "3-extend", "4-recover", "5-evaluate", "6-publish", "final", "losses"}
    files = {"recipe.yaml", "journal.jsonl", "report.html", "report.md", "perplexity.svg", "perplexity.png"}
    assert names == steps | files, "and nothing half-written"
    assert {path.stem for path in (done.folder / "losses").iterdir()} == {"original", "converted", "recovered"}
    assert load_recipe(done.folder) == load_recipe(done.recipe)
    final = {path.name for path in (done.folder / "final").iterdir()}
    assert {"README.md", "retrofit.json", "config.json", "model.safetensors", "tokenizer.json"} <= final


def test_the_journal_has_a_line_for_each_step_with_what_it_took(done: SimpleNamespace) -> None:
    lines = journal(done.folder)
    assert [line["step"] for line in lines] == [*PIECES, "publish"]
    for line in lines:
        assert line["seconds"] > 0 and line["peak_bytes"] > 50e6 and len(line["fingerprint"]) == 64
        assert all(sha256(done.folder / name) == digest for name, digest in line["digests"].items())
    assert all(line["predicted_seconds"] > 0 and line["predicted_peak_bytes"] > 0 for line in lines)


def test_the_published_model_has_fewer_heads_and_a_longer_window(done: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(done.folder / "final")
    assert model.config.num_key_value_heads == 1 and model.config.max_position_embeddings == 1024
    record = json.loads((done.folder / "final" / "retrofit.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["convert", "extend", "recover"]
    assert record["reload"]["passed"] and record["gate"][0]["passed"] and record["source"]["digests"]


def test_metrics_are_those_of_the_stored_losses(done: SimpleNamespace) -> None:
    losses = {name: TokenLosses.load(done.folder / "losses" / f"{name}.npz") for name in ("original", "recovered")}
    ppl = {name: np.exp(np.mean(found.losses[0][:127], dtype=np.float64)) for name, found in losses.items()}
    metrics = done.result.metrics
    assert metrics["ppl@128"] == pytest.approx(ppl["recovered"])
    assert metrics["ppl_ratio@128/held.txt"] == pytest.approx(ppl["recovered"] / ppl["original"])
    assert metrics["kv_ratio"] == 0.25 and 0 <= metrics["kernel_max_diff"] < 1e-3
    tail = np.exp(np.mean(losses["recovered"].losses[0][599 - 32 : 599], dtype=np.float64))
    assert metrics["tail_ppl@600"] == pytest.approx(tail)
    cost = {label: found["cost"] and found["cost"]["lengths"] for label, found in done.result.models.items()}
    assert cost["converted"] is None, "between the first and the last"
    assert [(one["length"], one["decode_tokens"]) for one in cost["original"]] == [(32, 2), (64, 2)]
    assert cost["recovered"][1]["kv_bytes"] * 4 == cost["original"][1]["kv_bytes"]
    cache = done.result.models["recovered"]["kv_cache_bytes"]
    assert list(cache) == ["64", "128", "600", "1024"]
    assert cache["1024"] == 1024 * done.result.models["recovered"]["kv_bytes_per_token"], "of the whole window"


def test_a_converted_configuration_speaks_the_older_names_as_well(done: SimpleNamespace) -> None:
    config = json.loads((done.folder / "1-convert" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_what_is_published_names_no_path_of_this_machine(done: SimpleNamespace, texts: Path) -> None:
    said = (done.folder / "final" / "retrofit.json").read_text()
    assert str(texts) in (done.folder / "4-recover" / "retrofit.json").read_text()
    assert str(texts) not in said and texts.joinpath("train").name in said


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_stops_keeps_what_a_later_one_goes_on_from(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    out = tmp_path / "run"

    def full(*args: object, **kwargs: object) -> None:
        (out / "1-convert.work").mkdir()
        if begun:
            (out / "1-convert.work" / "stream").write_bytes(b"hours of work")
        raise UserError("the disk is full")

    monkeypatch.setattr("retrofit.workflow.steps.convert.Convert.run", full)
    assert retrofit("run", recipe(), "--out", out).exit_code == 2
    assert out.exists() == begun


def test_weights_that_do_not_change_are_files_of_their_own(done: SimpleNamespace) -> None:
    assert (done.folder / "1-convert" / "model.safetensors").stat().st_nlink == 1
    assert (done.folder / "final" / "model.safetensors").stat().st_nlink == 1


def test_the_same_command_again_does_nothing_again(done: SimpleNamespace) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*.safetensors")}
    again = run(done.recipe, "--out", done.folder)
    assert (
        again.reused == ["convert", "extend", "recover", "evaluate", "publish"] and again.metrics == done.result.metrics
    )
    assert before == {path: path.stat().st_mtime_ns for path in done.folder.rglob("*.safetensors")}


def test_a_changed_recovery_repeats_only_what_depends_on_it(done: SimpleNamespace, copy: Path) -> None:
    change = ["--set", "recover.learning_rate=0.01", "--set", "publish=null"]
    again = run(done.recipe, "--out", copy, *change)
    assert again.reused == ["convert", "extend", "evaluate:original", "evaluate:converted"]
    assert again.metrics["ppl@64"] != done.result.metrics["ppl@64"]
    assert not (copy / "final").exists(), "what was published is not this model"


def test_lengths_are_arithmetic_on_stored_losses(done: SimpleNamespace, copy: Path) -> None:
    again = run(done.recipe, "--out", copy, "--set", "evaluate.lengths=[100, 600]", "--set", "require={}", *NO_PUBLISH)
    assert "evaluate" not in again.reused and {"evaluate:original", "evaluate:recovered"} <= set(again.reused)


def test_models_between_the_first_and_the_last_are_left_out_when_told(done: SimpleNamespace, copy: Path) -> None:
    again = run(done.recipe, "--out", copy, "--set", "evaluate.intermediate=false", *NO_PUBLISH)
    assert list(again.models) == ["original", "recovered"]
    assert again.metrics == done.result.metrics
    assert "evaluate:recovered" in again.reused


def test_from_repeats_a_step_and_all_after_it_in_the_folder_that_is_named(done: SimpleNamespace, copy: Path) -> None:
    again = run(copy, "--from", "evaluate", *NO_PUBLISH)
    assert again.folder == str(copy)
    assert again.reused == ["convert", "extend", "recover"] and again.metrics == done.result.metrics


def test_a_damaged_artifact_is_made_again_with_the_same_bytes(done: SimpleNamespace, copy: Path) -> None:
    weights = copy / "1-convert" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = run(done.recipe, "--out", copy, *NO_PUBLISH)
    assert "convert" not in again.reused and {"recover", "evaluate"} <= set(again.reused)
    assert weights.read_bytes() == good


def test_a_stricter_gate_takes_back_what_was_published(done: SimpleNamespace, copy: Path) -> None:
    result = retrofit("run", done.recipe, "--out", copy, "--set", "require.ppl_ratio@64=<= 0.001")
    assert result.exit_code == 2 and not (copy / "final").exists()


def test_an_engine_that_is_too_far_away_takes_back_what_was_published(done: SimpleNamespace, copy: Path) -> None:
    asked = ("--set", "publish.engines=[transformers]", "--set", "require.engine@transformers=< 0")
    result = retrofit("run", done.recipe, "--out", copy, *asked)
    assert result.exit_code == 2
    assert "engine@transformers is" in result.output
    assert not (copy / "final").exists()
    refused = retrofit("run", done.recipe, "--out", copy, "--set", "require.engine@vllm=< 1")
    assert "add vllm to publish.engines" in refused.output


def test_a_kernel_that_is_not_proven_is_not_published(
    done: SimpleNamespace, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(check.TOLERANCE, "float32", 0.0)
    monkeypatch.setattr(check, "AMPLIFIED", 0)
    result = retrofit("run", done.recipe, "--out", copy, "--from", "evaluate")
    assert result.exit_code == 2 and "kernel_max_diff" in result.output and not (copy / "final").exists()
    assert "kernel_max_diff" in (copy / "report.md").read_text()


def test_dry_run_checks_and_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    result = retrofit("run", recipe(), "--out", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    assert [step["step"] for step in json.loads(result.stdout)["steps"]][-1] == "publish"
    refused = retrofit("run", recipe(convert={"kv_heads": 3}), "--out", tmp_path / "out", "--dry-run")
    assert refused.exit_code == 2


def test_compare_reads_run_folders(done: SimpleNamespace) -> None:
    other = done.folder / "losses" / "original.npz"
    result = retrofit("compare", done.folder, other, "--lengths", "128", "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["rows"][0]
    assert row["ratio"] == pytest.approx(1 / done.result.metrics["ppl_ratio@128"])
