"""The learning rate of a model that nothing is known about: three rates tried in a few steps each, from the same start.

Each try is a whole short training, warm-up and decay included, on the first rows of the real one; afterwards the
weights are put back. The rate with the lowest loss over the second half of its steps is taken.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from retrofit.recipe.recovery import PROBE_MOST, PROBE_SHARE, TRIES
from retrofit.recovery.adapters import trainable
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.callbacks import DivergedError
from retrofit.recovery.checkpoints import put_weights
from retrofit.recovery.settings import training_arguments
from retrofit.recovery.trainer import Objective, RecoveryTrainer
from retrofit.system.world import World

if TYPE_CHECKING:
    from peft import PeftModel

    from retrofit.console import Progress

TRIED = tuple(3.0**power for power in range(-(TRIES // 2), TRIES // 2 + 1))  # times the recipe's rate
_FILE = "learning-rate.json"


@dataclass(frozen=True)
class TriedRate:
    """loss: mean of the second half of the steps, nats per token; None where it was not finite."""

    learning_rate: float
    steps: int
    loss: float | None


def try_rates(
    model: PeftModel,
    objective: Objective,
    batches: MicroBatches,
    *,
    compute: torch.dtype,
    device: str,
    work_dir: Path,
    seed: int,
    fingerprint: str,
    world: World,
    progress: Progress | None = None,
) -> tuple[TriedRate, ...]:
    """Train at TRIED times the recipe's rate for a few steps; the model is left as it was. All processes call it.

    fingerprint: of the training: what an earlier session of it tried is not tried again.
    """
    path = work_dir / _FILE
    kept = world.share(_kept(path, fingerprint) if world.main else ())
    if kept:
        return kept
    start, steps = trainable(model), min(PROBE_MOST, batches.steps // PROBE_SHARE)
    recipe = objective.recipe
    assert recipe.learning_rate is not None
    found: list[TriedRate] = []
    if progress is not None:
        progress.start("trying learning rates", len(TRIED) * steps, "steps")
    for factor in TRIED:
        section = recipe.model_copy(update={"learning_rate": recipe.learning_rate * factor, "report_to": ()})
        arguments = training_arguments(section, work_dir, batches, device, seed)
        arguments.max_steps, arguments.save_strategy = steps, arguments.eval_strategy
        arguments.warmup_steps = math.ceil(recipe.warmup_ratio * steps)
        losses = _Losses()
        trainer = RecoveryTrainer(
            objective=objective,
            compute=compute,
            watch=losses,
            model=model,
            args=arguments,
            train_dataset=batches,
            callbacks=[losses],
            seed=seed if recipe.adapter.dropout else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        put_weights(model, start)
        found.append(TriedRate(recipe.learning_rate * factor, steps, losses.second_half(world)))
        if progress is not None:
            progress.advance(steps, **({} if found[-1].loss is None else {"loss": found[-1].loss}))
    if progress is not None:
        progress.finish()
    if world.main:
        partial = path.with_suffix(".partial")
        record = {"fingerprint": fingerprint, "tries": [asdict(one) for one in found]}
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(path)
    return tuple(found)


def _kept(path: Path, fingerprint: str) -> tuple[TriedRate, ...]:
    if not path.exists():
        return ()
    record = json.loads(path.read_text("utf-8"))
    return tuple(TriedRate(**one) for one in record["tries"]) if record["fingerprint"] == fingerprint else ()


def best_rate(tries: tuple[TriedRate, ...]) -> float:
    """The rate of the lowest loss. Raises DivergedError where none is finite."""
    finite = [(one.loss, one.learning_rate) for one in tries if one.loss is not None]
    if not finite:
        raise DivergedError(
            f"the loss is not finite at any rate of {', '.join(f'{one.learning_rate:.2g}' for one in tries)}"
        )
    return min(finite)[1]


def in_words(tries: tuple[TriedRate, ...]) -> str:
    """What was tried, and what is taken."""
    parts = (f"{one.learning_rate:.2g}: {'not finite' if one.loss is None else f'{one.loss:.3g}'}" for one in tries)
    return f"learning rate {best_rate(tries):.2g}, by the loss of {tries[0].steps} steps each ({', '.join(parts)})"


class _Losses(TrainerCallback):
    """The losses of the steps, on the device."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.now: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """A part of the step's mean loss."""
        self.now.append(loss)

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.steps.append(torch.stack(self.now).sum())
        self.now = []

    def second_half(self, world: World) -> float | None:
        """Their mean over the second half of the steps, on all processes together."""
        losses = world.sum_(torch.stack(self.steps))
        mean = float(losses[len(losses) // 2 :].mean())
        return mean if math.isfinite(mean) else None
