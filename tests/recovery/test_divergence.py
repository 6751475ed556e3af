"""A training that goes wrong stops, with its best weights or with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.console import Silent
from retrofit.data.packing import Packed, training_rows
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from retrofit.recovery.callbacks import DivergedError, TrainState, Watch
from tests.recovery.pair import RECIPE, folders, rows, run
from tests.tiny import tiny_tokenizer

__all__ = ["folders", "rows"]  # fixtures


def test_when_nothing_is_better_the_start_is_kept_byte_for_byte(folders, rows, tmp_path: Path) -> None:
    progress = Silent()
    recipe = RECIPE.model_copy(update={"learning_rate": 30.0, "max_grad_norm": 1e9, "warmup_ratio": 0.0})
    report = run((folders[1], folders[1]), rows, tmp_path, recipe, progress=progress)
    assert report.best_step == 0
    assert report.best_loss == report.start_loss
    assert any("no measurement was better" in note for note in progress.notes)
    before, after = Checkpoint.open(folders[1]), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_fix(folders, rows, tmp_path, monkeypatch) -> None:
    import retrofit.recovery.trainer as trainer

    calls = iter(range(100))
    real = trainer.distill_loss
    # Two calls measure the two held-out rows at the start.
    monkeypatch.setattr(trainer, "distill_loss", lambda *a: real(*a) * (float("nan") if next(calls) >= 4 else 1.0))
    with pytest.raises(UserError, match="step 3") as caught:
        run(folders, rows, tmp_path)
    assert "learning_rate" in str(caught.value.fix)
    assert not any((tmp_path / "out").iterdir())


LONG = RECIPE.model_copy(update={"tokens": 96 * 48, "evals": 12})


def absurd(monkeypatch: pytest.MonkeyPatch, step: int, factor: float) -> None:
    """From this step on the training's losses are so many times themselves."""
    real = Watch.on_step_end

    def worse(self, args, state, control, **kwargs) -> None:
        self.loss = self.loss * (factor if state.global_step >= step else 1.0)
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watch, "on_step_end", worse)


@pytest.fixture(scope="module")
def many(rows: tuple[Packed, Packed]) -> tuple[Packed, Packed]:
    train = training_rows((TextSource(source="python-docs"),), tiny_tokenizer(), LONG.tokens, 48, 0)
    return train, rows[1]


def test_an_absurd_rate_stops_at_once_with_the_fix(folders, many, tmp_path: Path) -> None:
    recipe = LONG.model_copy(update={"learning_rate": 1.0, "max_grad_norm": 1e9, "warmup_ratio": 0.0})
    with pytest.raises(UserError, match=r"steps up to (9|1\d) is .* at the start") as caught:
        run(folders, many, tmp_path, recipe)
    assert "try a third" in str(caught.value.fix)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("factor", "last"), [(float("inf"), 30), (100.0, 31)])
def test_a_training_that_diverges_later_keeps_its_best_weights(
    folders, many, tmp_path, monkeypatch, factor, last
) -> None:
    absurd(monkeypatch, 30, factor)
    report = run(folders, many, tmp_path, LONG)
    assert report.best_step in {4, 8, 12, 16, 20, 24, 28}
    assert report.best_loss < 0.8 * report.start_loss
    assert report.history[-1].step <= last
    assert report.tokens == report.history[-1].step * 2 * 48
    assert any(
        note.startswith("stopped early: ") and f"step {report.best_step} are kept" in note for note in report.notes
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    with torch.no_grad():
        log_t, log_s = (model(many[1].ids_NT).logits.log_softmax(-1) for model in (teacher, student))
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert report.best_loss == pytest.approx(float(divergence), rel=1e-4)


def test_a_stage_that_learns_from_the_text_is_compared_with_itself() -> None:
    """Distilling loses 0.05 nats a token and learning 3: that is another loss, and no divergence."""
    course = TrainState("", start_loss=0.05)
    watch = Watch(
        course,
        weights=dict,
        held_out_loss=None,
        evaluate_at=frozenset(),
        tokens_per_step=1,
        progress=None,
        learned=lambda step: step > 10,
    )

    def step(number: int, loss: float) -> None:
        watch.unread.append((number, torch.tensor(loss), 1e-3))
        watch.read()

    for number in range(1, 11):
        step(number, 0.05)
    for number in range(11, 31):
        step(number, 3.0)
    with pytest.raises(DivergedError, match=r"steps up to"):
        for number in range(31, 50):
            step(number, 30.0)
