"""Training ends better than it started, survives a kill with the same bytes, and fails with a clear error."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from retrofit.checkpoint.read import Checkpoint
from retrofit.console import Silent
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.recipe.schema import Adapter
from retrofit.recovery import train
from retrofit.recovery.adapters import default_rate
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.callbacks import Watch
from retrofit.recovery.schedule import TrainRows
from retrofit.recovery.settings import training_arguments
from tests.recovery.pair import MIXED, RECIPE, STAGES, digest, folders, rows, run
from tests.tiny import save_tiny, tiny_config

__all__ = ["folders", "rows"]  # fixtures


def test_distillation_brings_the_student_nearer_and_leaves_the_rest_alone(folders, rows, tmp_path: Path) -> None:
    report = run(folders, rows, tmp_path)
    assert report.start_loss is not None
    assert report.best_loss is not None
    assert report.best_loss < 0.8 * report.start_loss
    assert report.best_step in {4, 8}
    assert report.steps == 8
    assert report.tokens == RECIPE.tokens
    assert [point.step for point in report.history] == list(range(9))
    rates = [point.learning_rate for point in report.history[1:]]
    assert rates[0] == 0.0
    assert rates[1] == max(rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    before, after = Checkpoint.open(folders[0]), Checkpoint.open(tmp_path / "out")
    assert set(before.names) == set(after.names)
    for name in before.names:
        assert after.dtype(name) == before.dtype(name)
        assert torch.equal(before.tensor(name), after.tensor(name)) == ("proj" not in name), name


def test_the_written_checkpoint_has_the_loss_that_was_measured(folders, rows, tmp_path: Path) -> None:
    report = run(folders, rows, tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    with torch.no_grad():
        log_t, log_s = (model(rows[1].ids_NT).logits.log_softmax(-1) for model in (teacher, student))
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert report.best_loss == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_other_divergences_bring_the_student_nearer(folders, rows, tmp_path, divergence) -> None:
    report = run(folders, rows, tmp_path, RECIPE.model_copy(update={"divergence": divergence}))
    assert report.start_loss is not None
    assert report.best_loss is not None
    assert report.best_loss < 0.8 * report.start_loss


def test_without_a_learning_rate_it_follows_from_the_width(folders, rows, tmp_path) -> None:
    recipe = RECIPE.model_copy(update={"learning_rate": None, "warmup_ratio": 0.0})
    report = run(folders, rows, tmp_path, recipe)
    width = AutoModelForCausalLM.from_pretrained(folders[0]).config.hidden_size
    assert report.history[1].learning_rate == pytest.approx(0.576 / width)
    assert any(f"width of {width}" in note for note in report.notes)


def test_windows_alone_are_trained_at_a_fifth_of_the_rate() -> None:
    teacher = describe(tiny_config("qwen2"))
    windowed = teacher.with_windows(32, {0})
    usual = 0.576 / teacher.hidden_size
    assert default_rate(windowed, teacher) == pytest.approx(usual / 5)
    assert default_rate(windowed, None) == usual
    assert default_rate(teacher, teacher) == usual
    assert default_rate(windowed.with_kv_heads(1), teacher) == usual
    assert default_rate(replace(windowed, max_position_embeddings=2048), teacher) == usual


def test_more_gpus_than_one_do_not_split_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_gpus(arguments: TrainingArguments) -> torch.device:
        arguments._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    batches = MicroBatches(TrainRows(torch.zeros(16, 48, dtype=torch.long), None, (48,) * 16), 2, every_token=True)
    arguments = training_arguments(RECIPE, tmp_path, batches, "cuda", 0)
    assert arguments._n_gpu == 1
    assert arguments.train_batch_size == RECIPE.batch_size
    assert arguments.max_steps == 8


@pytest.mark.parametrize(
    ("killed_at", "positions"), [(3, "full"), (5, "full"), (8, "full"), (5, "pose"), (5, "mixed"), (5, "long")]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    folders, rows, tmp_path, monkeypatch, killed_at, positions
) -> None:
    recipe = RECIPE.model_copy(update={"adapter": Adapter(rank=4, alpha=8, dropout=0.1)})
    if positions == "pose":
        recipe = recipe.model_copy(update={"positions": "pose", "stages": STAGES})
    if positions in ("mixed", "long"):
        recipe = recipe.model_copy(update={"stages": MIXED, "token_weights": "long" if positions == "long" else "even"})
    whole = run(folders, rows, tmp_path / "whole", recipe)

    class Killed(BaseException):
        pass

    step_end = Watch.on_step_end

    def die(self, args, state, control, **kwargs) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == killed_at:
            (Path(args.output_dir) / f"checkpoint-{killed_at}").mkdir()  # half a checkpoint
            raise Killed

    monkeypatch.setattr(Watch, "on_step_end", die)
    with pytest.raises(Killed):
        run(folders, rows, tmp_path / "killed", recipe)
    monkeypatch.setattr(Watch, "on_step_end", step_end)
    again = run(folders, rows, tmp_path / "killed", recipe)
    assert again.resumed_from == (killed_at - 1) // 2 * 2
    assert digest(tmp_path / "killed/out") == digest(tmp_path / "whole/out")
    losses = [[(p.step, p.loss, p.held_out_loss, p.learning_rate) for p in r.history] for r in (whole, again)]
    assert losses[0] == losses[1]
    assert (whole.best_step, whole.best_loss) == (again.best_step, again.best_loss)


def test_a_finished_training_is_not_run_again_and_another_recipe_starts_anew(folders, rows, tmp_path: Path) -> None:
    first = run(folders, rows, tmp_path)
    bytes_before = digest(tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    recipe = RECIPE.model_copy(update={"allow_repeats": True, "keep_adapter": True})  # which change no weight
    again = run(folders, rows, tmp_path, recipe)
    assert again.resumed_from == again.steps
    assert again.history == first.history
    assert digest(tmp_path / "out") == bytes_before
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    other = run(folders, rows, tmp_path, RECIPE.model_copy(update={"learning_rate": 5e-3}))
    assert other.resumed_from == 0


@pytest.mark.parametrize("loss", ["distill", "lm"])
def test_rows_computed_one_at_a_time_and_losses_read_in_groups_give_the_same_training(
    folders, rows, tmp_path, monkeypatch, loss
) -> None:
    recipe = RECIPE.model_copy(update={"loss": loss, "tokens": 15 * 48})  # the last step has one row
    text = replace(rows[0], ids_NT=rows[0].ids_NT[:15])
    whole = run(folders, (text, rows[1]), tmp_path / "whole", recipe)
    monkeypatch.setattr(train, "micro_batch", lambda rows, attempt, device: attempt(1) or 1)
    monkeypatch.setattr(train, "steps_between_readings", lambda device: 3)
    parts = run(folders, (text, rows[1]), tmp_path / "parts", recipe)
    assert any("1 of the 2 rows" in note for note in parts.notes)
    assert [point.step for point in parts.history] == [point.step for point in whole.history]
    for ours, theirs in zip(parts.history[1:], whole.history[1:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert (ours.held_out_loss is None) == (theirs.held_out_loss is None)
    assert parts.best_loss == pytest.approx(whole.best_loss, rel=1e-4)


def test_language_model_loss_without_held_out_text_keeps_the_last_weights(folders, rows, tmp_path: Path) -> None:
    progress = Silent()
    recipe = RECIPE.model_copy(update={"loss": "lm", "gradient_checkpointing": True})
    report = run((folders[0], None), (rows[0], None), tmp_path, recipe, progress=progress)
    losses = [point.loss for point in report.history if point.loss is not None]
    assert report.best_step == report.steps
    assert losses[-1] < losses[0]
    assert any("nothing is held out" in note for note in progress.notes)


def test_distillation_needs_a_teacher_of_the_same_vocabulary(folders, rows, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the original model"):
        run((folders[0], None), rows, tmp_path)
    other = save_tiny(tmp_path / "other", "llama", vocab_size=300)
    with pytest.raises(UserError, match="vocabulary"):
        run((folders[0], other), rows, tmp_path)


def test_a_kept_adapter_merged_by_peft_is_what_was_written(folders, rows, tmp_path: Path) -> None:
    """Also with modules that are trained in full; its files name no path of this machine."""
    from peft import PeftModel

    recipe = RECIPE.model_copy(update={"adapter": Adapter(rank=4, alpha=8, norms=True)})
    (tmp_path / "adapter").mkdir()
    run(folders, rows, tmp_path, recipe, adapter=tmp_path / "adapter")
    student = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    merged = PeftModel.from_pretrained(student, tmp_path / "adapter").merge_and_unload().state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert merged.keys() == written.keys()
    for name, value in written.items():
        torch.testing.assert_close(merged[name], value)
    assert any(not torch.equal(before[name], value) for name, value in written.items())
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert str(folders[0]) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_losses_are_logged_where_the_recipe_says_and_change_no_byte(folders, rows, tmp_path: Path, monkeypatch) -> None:
    logged: list[tuple[str, str, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            logged.append((self.log_dir, tag, step))

        def add_text(self, *_: object) -> None: ...

        flush = close = add_text

    module = ModuleType("tensorboardX")
    module.__spec__ = ModuleSpec("tensorboardX", None)
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(folders, rows, tmp_path / "a")
    assert logged == []
    recipe = RECIPE.model_copy(update={"report_to": ("tensorboard",)})
    run(folders, rows, tmp_path / "b", recipe, logs=tmp_path / "logs")
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "b" / "out")
    assert {folder for folder, _, _ in logged} == {str(tmp_path / "logs")}
    assert [step for _, tag, step in logged if tag == "train/loss"] == list(range(1, 9))
    assert [step for _, tag, step in logged if tag == "eval/loss"] == [0, 4, 8]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
