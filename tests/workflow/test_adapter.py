"""An adapter that is kept beside its checkpoint, and losses that are logged: in a run folder, and beside `--out`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retrofit.recovery import train
from retrofit.workflow.steps import recover as step
from tests.workflow.conftest import retrofit, sections

Recipe = Callable[..., Path]
OTHERS = {"convert": None, "context": None, "evaluate": None, "publish": None, "require": {}}


@pytest.fixture
def recovering(recipe: Recipe, model: Path, texts: Path) -> Callable[..., Path]:
    """A recipe that only recovers; keywords replace keys of the section."""
    base = sections(model, texts)["recover"]
    return lambda **changed: recipe(**OTHERS, recover={**base, "loss": "lm", **changed})


def require_equal(student: Path, adapter: Path, written: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(merged[name], value)


@pytest.mark.slow
def test_a_run_keeps_the_adapter_as_long_as_the_recipe_says(
    recovering: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    run, file = tmp_path / "run", recovering(keep_adapter=True)
    assert retrofit("run", file, "--out", run).exit_code == 0
    require_equal(model, run / "4-recover-adapter", run / "4-recover")
    again = retrofit("run", file, "--out", run)
    assert "recover: done before, kept" in again.output
    (run / "4-recover-adapter" / "adapter_model.safetensors").unlink()
    repaired = retrofit("run", file, "--out", run)
    assert "done before" not in repaired.output
    require_equal(model, run / "4-recover-adapter", run / "4-recover")
    assert retrofit("run", recovering(), "--out", run).exit_code == 0
    assert not (run / "4-recover-adapter").exists()
    assert not list(run.glob("*.work"))


def test_a_command_keeps_it_beside_its_output(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, adapter = tmp_path / "out", tmp_path / "out-adapter"
    options = ("--tokens", 256, "--sequence-length", 64, "--loss", "lm", "--text", texts / "train", "--keep-adapter")
    command = ("recover", model, "--teacher", model, *options, "--out", out)
    adapter.mkdir()
    (adapter / "thesis.txt").write_text("years of work")
    refused = retrofit(*command)
    assert refused.exit_code == 2
    assert "out-adapter" in refused.output
    assert [file.name for file in adapter.iterdir()] == ["thesis.txt"]
    (adapter / "thesis.txt").unlink()

    stopped: list[object] = []

    def stop(report: object) -> None:
        stopped.append(report)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the adapter has its name, and before the checkpoint has
        patch.setattr("retrofit.checkpoint.staging._sync", lambda folder: stop(folder) if adapter_whole(adapter) else 0)
        assert retrofit(*command).exit_code != 0
    assert stopped
    assert adapter_whole(adapter)
    assert not out.exists()
    assert retrofit(*command).exit_code == 0
    require_equal(model, adapter, out)
    assert json.loads((adapter / "retrofit.json").read_text())["steps"][0]["step"] == "recover"
    other = retrofit(*command, "--learning-rate", "0.001")
    assert other.exit_code == 2
    assert retrofit(*command, "--learning-rate", "0.001", "--overwrite").exit_code == 0
    require_equal(model, adapter, out)


def adapter_whole(adapter: Path) -> bool:
    """Whether the folder has its name and its files."""
    return (adapter / "adapter_model.safetensors").is_file()


def test_a_tracker_that_is_not_installed_is_told_before_anything(
    recovering: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    for arguments in (("--dry-run",), ()):
        refused = retrofit("run", recovering(report_to=["trackio"]), "--out", tmp_path / "run", *arguments)
        assert refused.exit_code == 2
        assert "the package `trackio` is not installed" in refused.output
        assert "pip install trackio" in refused.output
    assert not (tmp_path / "run").exists()
    unknown = retrofit("run", recovering(report_to=["teletype"]), "--out", tmp_path / "run")
    assert unknown.exit_code == 2
    assert "tensorboard" in unknown.output


def test_logs_outlive_the_step_and_ask_no_new_training(
    recovering: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", train.recover

    def logging(*arguments: object, logs: Path | None, **options: object) -> object:
        arguments = (*arguments[:3], arguments[3].model_copy(update={"report_to": ()}), *arguments[4:])  # type: ignore[attr-defined]
        if logs is not None:
            logs.mkdir(parents=True)
            (logs / "events").write_text("losses")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "find_spec", lambda name: object())
    monkeypatch.setattr(train, "recover", logging)
    assert retrofit("run", recovering(report_to="tensorboard"), "--out", run).exit_code == 0
    (events,) = run.glob("4-recover-logs/*/events")
    assert events.read_text() == "losses"
    again = retrofit("run", recovering(), "--out", run)
    assert "recover: done before, kept" in again.output
    assert events.is_file()
