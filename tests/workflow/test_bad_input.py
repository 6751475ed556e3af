"""Bad input: exit code 2, no traceback, the reason and the fix in words, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoint import staging
from retrofit.checkpoint.lock import folder_lock
from tests.workflow.conftest import retrofit

Recipe = Callable[..., Path]


def refused(out: Path, *arguments: object) -> str:
    """Run in `out`, which must be refused; returns what was said."""
    before = sorted(out.parent.rglob("*"))
    result = retrofit("run", *arguments, "--out", out)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    assert "fix:" in result.output
    assert sorted(out.parent.rglob("*")) == before, "something was written"
    return result.output


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs" / "one"


def copy_of(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_unknown_key(recipe: Recipe, out: Path) -> None:
    text = refused(out, recipe(convert={"kv_head": 1, "kv_heads": 1}))
    assert "recipe.yaml:" in text
    assert "did you mean `kv_heads`?" in text


def test_wrong_type(recipe: Recipe, out: Path) -> None:
    said = refused(out, recipe(), "--set", "recover.tokens=many")
    assert "must be a whole number of tokens, for example 4096 or 32k, not `many`" in said


def test_kv_heads_that_do_not_divide(recipe: Recipe, out: Path) -> None:
    text = refused(out, recipe(convert={"kv_heads": 3, "method": "mean"}))
    assert "3 does not divide 4 KV heads" in text
    assert "1, 2, 4" in text


def test_unknown_architecture(recipe: Recipe, out: Path, model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    text = refused(out, recipe(), "--model", other)
    assert "mamba" in text
    assert "llama, ministral, mistral" in text


def test_missing_files(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    assert "missing" in refused(out, tmp_path / "missing.yaml")
    assert "no folder" in refused(out, recipe(), "--model", tmp_path / "missing")
    assert "missing.txt" in refused(out, recipe(), "--set", f"evaluate.text=[{tmp_path}/missing.txt]")


def test_truncated_shard(recipe: Recipe, out: Path, model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path)
    shard = other / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors" in refused(out, recipe(), "--model", other)


def test_weights_that_are_not_finite(recipe: Recipe, out: Path, model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] = torch.nan
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.self_attn.k_proj.weight" in refused(out, recipe(), "--model", other)


def test_weights_that_are_not_whole(recipe: Recipe, out: Path, model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path)
    weights = load_file(other / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 tensors" in refused(out, recipe(recover=None), "--model", other)


def test_weights_that_the_dtype_cannot_hold(recipe: Recipe, out: Path, model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    said = refused(out, recipe(dtype="float16"), "--model", other)
    assert "model.layers.0.mlp.up_proj.weight" in said
    assert "bfloat16 or float32" in said


def test_no_disk_space(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "disk space" in refused(out, recipe())


def test_empty_text(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert "empty" in refused(out, recipe(), "--set", f"evaluate.text=[{tmp_path}/empty.txt]")
    assert "empty" in refused(out, recipe(), "--set", f"recover.text=[{tmp_path}/empty.txt]")


def test_two_texts_with_one_name(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("some words " * 400)
    both = f"[{tmp_path}/a/notes.txt, {tmp_path}/b/notes.txt]"
    for key in ("evaluate.text", "recover.text"):
        text = refused(out, recipe(), "--set", f"{key}={both}")
        assert "a/notes.txt" in text
        assert "b/notes.txt` are both called `notes.txt`" in text
        assert key in text
        assert "rename one" in text
    convert = ["--set", "convert.method=calibrated", "--set", "convert.calibration.sequence_length=64"]
    text = refused(out, recipe(), *convert, "--set", f"convert.calibration.text={both}")
    assert "convert.calibration.text" in text
    assert "are both called" in text


def test_text_shorter_than_the_longest_length(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words.")
    text = refused(out, recipe(), "--set", f"evaluate.text=[{tmp_path}/short.txt]")
    assert "600" in text and "18" in text, "says how long the text is"


def test_lengths_beyond_the_window(recipe: Recipe, out: Path) -> None:
    assert "1024 positions" in refused(out, recipe(), "--set", "evaluate.lengths=[64, 2048]")


def test_no_write_permission(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.os, "access", lambda *_: False)  # as root, every folder is writable
    assert "permission" in refused(out, recipe())


@pytest.mark.parametrize("target", ["nowhere/x", "one"])
def test_a_link_to_nothing(recipe: Recipe, out: Path, target: str) -> None:
    out.symlink_to(target)
    assert "is a symbolic link to something that is not there" in refused(out, recipe())


def test_folder_in_use(recipe: Recipe, out: Path) -> None:
    with folder_lock(out):
        assert "in use by process" in refused(out, recipe())


def test_a_folder_that_is_not_a_run(recipe: Recipe, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "not a run" in refused(out, recipe())


def test_requirements_on_what_is_not_measured(recipe: Recipe, out: Path) -> None:
    text = refused(out, recipe(require={"ppl@256": "<= 3"}))
    assert "nothing is measured at 256" in text
    option = re.search(r"--set '(require=\{ppl@\d+: \"<= 3\"\})'", text)
    assert option is not None
    assert retrofit("plan", recipe(require={"ppl@256": "<= 3"}), "--set", option[1]).exit_code == 0
    assert "needs a length" in refused(out, recipe(require={"ppl": "<= 3"}))
    assert "certifies an effective length" in refused(out, recipe(require={"effective_length": ">= 64"}))
    assert "no text `prose`" in refused(out, recipe(require={"ppl@64/prose": "<= 3"}))


def test_a_base_model_that_is_no_hub_id(recipe: Recipe, out: Path) -> None:
    assert "not a hub id" in refused(out, recipe(publish={"base_model": "/home/me/model"}))


def test_no_model(recipe: Recipe, out: Path) -> None:
    assert "--model" in refused(out, recipe(model=None))


def test_a_step_that_the_recipe_has_not(recipe: Recipe, out: Path) -> None:
    assert "no step `recover`" in refused(out, recipe(recover=None), "--from", "recover")


def test_a_window_that_is_not_longer(recipe: Recipe, out: Path) -> None:
    assert "not longer" in refused(out, recipe(context={"length": 512}))


def test_gate_not_met(recipe: Recipe, out: Path) -> None:
    """What was measured is shown and kept, the checkpoint too; nothing is in final/."""
    result = retrofit("run", recipe(recover=None, require={"ppl_ratio@64": "<= 0.001"}), "--out", out)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output + repr(result.exception)
    assert "ppl_ratio@64" in result.output
    assert "fix:" in result.output
    assert not (out / "final").exists()
    assert not (out / "final.partial").exists()
    assert "ppl_ratio@64" in (out / "report.md").read_text()
    shown = result.stdout
    assert shown.index("Perplexity (95% interval)") < shown.index("Requirements") < shown.index("report.html")
    assert f"a requirement is not met: {out / '3-extend'}" in shown
    assert f"report: {out / 'report.html'}" in result.stderr
    assert (out / "3-extend" / "model.safetensors").is_file()


def test_gate_not_met_for_machines(recipe: Recipe, out: Path) -> None:
    require = {"ppl_ratio@64": "<= 0.001"}
    plain = recipe(convert=None, recover=None, context=None, require=require)
    result = retrofit("run", plain, "--out", out, "--json", "--set", "evaluate.lengths=[64]")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["gate"][0]["passed"] is False
    assert found["final"] is None
    assert found["refused"] is None, "no step wrote a checkpoint"


@pytest.mark.parametrize("rename", [lambda name: name.removeprefix("model."), lambda name: f"model.{name}"])
def test_older_names_are_refused_alike_by_convert_and_extend(
    rename: Callable[[str], str], model: Path, tmp_path: Path
) -> None:
    """transformers reads a base model's names, and those with a prefix too many; other programs do not."""
    other = copy_of(model, tmp_path)
    weights = other / "model.safetensors"
    tensors = load_file(weights)
    save_file({name if "lm_head" in name else rename(name): t for name, t in tensors.items()}, weights)
    said = []
    for command in (["convert", other, "--kv-heads", 1, "--method", "mean"], ["extend", other, "--factor", 2]):
        result = retrofit(*command, "--out", tmp_path / "out")
        assert result.exit_code == 2, result.output
        said.append(result.output[result.output.index("tensors have") :])
    assert said[0] == said[1]
    assert "older names" in said[0]
    assert not (tmp_path / "out").exists()


def test_a_theta_left_to_the_class_is_told_and_a_lost_one_refused(
    recipe: Recipe, model: Path, tmp_path: Path, out: Path
) -> None:
    other = copy_of(model, tmp_path)
    config = json.loads((other / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "linear", "factor": 2.0}
    (other / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    asked = recipe(model=str(other), context={"factor": 2, "method": "linear"}, recover=None)
    result = retrofit("run", asked, "--out", out, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "rope_theta is missing: 10000" in " ".join(result.output.split())
    (other / "config.json").write_text(json.dumps({**config, "rope_parameters": scaling}))
    said = refused(out, asked)
    assert "rope_theta is missing" in said
    assert "write rope_theta" in said


def test_lengths_at_which_a_reloaded_model_cannot_be_compared(recipe: Recipe, out: Path) -> None:
    longrope = {"factor": 2, "method": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    short = {"lengths": [600], "documents": 1, "tail": 16, "text": ["python-docs"]}
    said = refused(out, recipe(context=longrope, evaluate=short, require={}))
    assert "change beyond 512 tokens" in said
    assert "at most 512" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--factor", "inf"), "finite"),
        (("--factor", "nan"), "finite"),
        (("--factor", "1e300"), "2147483647"),
        (("--length", 10**30), "2147483647"),
        (("--factor", 2, "--attention-factor", "inf"), "finite"),
        (("--factor", 2, "--attention-factor", "nan"), "finite"),
    ],
)
def test_numbers_without_an_end(model: Path, tmp_path: Path, options: tuple[object, ...], words: str) -> None:
    result = retrofit("extend", model, *options, "--method", "yarn", "--out", tmp_path / "long")
    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())
