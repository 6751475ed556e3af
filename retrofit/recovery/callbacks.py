"""What a training run knows about itself: history, held-out losses, the best adapter, and how it is resumed.

A checkpoint of the trainer counts only once its `recover.json` stands in it, which is written last; a kill at any
moment leaves the one before.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl

from retrofit.errors import UserError
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from retrofit.console import Progress

STATE, BEST = "recover.json", "best.safetensors"
WORSE, LAST = 3.0, 8  # a training diverges whose mean loss of the LAST steps is so many times that at the start
NOISE = 0.1  # nats: a loss below is small, whatever it was at the start


@dataclass(frozen=True)
class TrainPoint:
    """One optimizer step: mean training loss per token (nats), learning rate, and the held-out losses if measured: of
    text, and of passages out of sight."""

    step: int
    loss: float | None
    held_out_loss: float | None
    learning_rate: float
    tokens_per_second: float
    passage_loss: float | None = None


@dataclass
class TrainState:
    """Where a run stands. best_loss is None while nothing is held out; seconds count every session.

    start_passages, best_passages: the held-out loss of passages out of sight, None where there are none. stopped: why
    it ended before its last step; "" where it did not.
    """

    fingerprint: str
    history: list[TrainPoint] = field(default_factory=list)
    best_step: int = 0
    best_loss: float | None = None
    start_loss: float | None = None
    start_passages: float | None = None
    best_passages: float | None = None
    seconds: float = 0.0
    stopped: str = ""
    best: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Into a checkpoint folder; the state file, written last and renamed, makes the checkpoint count."""
        save_file(self.best, folder / BEST)
        record = {key: value for key, value in asdict_shallow(self).items() if key != "best"}
        partial = folder / f"{STATE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / STATE)

    @classmethod
    def load(cls, folder: Path) -> TrainState:
        """The state that `save` left in a checkpoint folder."""
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
        record["history"] = [TrainPoint(**point) for point in record["history"]]
        return cls(**record, best=load_file(folder / BEST))


def asdict_shallow(course: TrainState) -> dict[str, Any]:
    """The fields of a course as JSON values, tensors left as they are."""
    return {**vars(course), "history": [asdict(point) for point in course.history]}


def last_checkpoint(work_dir: Path, fingerprint: str) -> Path | None:
    """The newest whole checkpoint of this very training; remains of others and unfinished ones are removed."""
    best: tuple[int, Path] | None = None
    for folder in sorted(work_dir.glob("checkpoint-*")):
        step = folder.name.removeprefix("checkpoint-")
        state = folder / STATE
        if step.isdigit() and state.is_file() and json.loads(state.read_text("utf-8"))["fingerprint"] == fingerprint:
            best = max(best or (0, folder), (int(step), folder))
        else:
            shutil.rmtree(folder)
    return best[1] if best else None


class Watch(TrainerCallback):
    """Records every step, measures the held-out loss when due, keeps the best adapter, completes checkpoints.

    read_every: steps whose losses are read from the device together. They are also read before anything is measured or
    saved, so that no weights of a diverged training are kept. One that diverges stops: with the best weights so far
    where a measurement was better than the start, else with an error. world: the processes that train together: the
    step's loss is the sum of their shares, `weights` and `held_out_loss` are called on all of them. learned: whether a
    step learns from the text where the others distil: its loss is of another size, and compared with its own kind.
    """

    def __init__(
        self,
        course: TrainState,
        *,
        weights: Callable[[], dict[str, Tensor]],
        held_out_loss: Callable[[], float] | None,
        passage_loss: Callable[[], float] | None = None,
        evaluate_at: frozenset[int],
        tokens_per_step: int,
        progress: Progress | None,
        read_every: int = 1,
        world: World = ALONE,
        learned: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.course, self.weights = course, weights
        self.held_out_loss, self.passage_loss = held_out_loss, passage_loss
        self.evaluate_at, self.tokens_per_step, self.progress = evaluate_at, tokens_per_step, progress
        self.log: Callable[[dict[str, float]], None] | None = None  # to where the Trainer reports
        self.read_every, self.world, self.learned = read_every, world, learned
        self.loss: Tensor | None = None  # of the step so far, on the device
        self.unread: list[tuple[int, Tensor, float]] = []  # (step, its loss, learning rate)
        self.busy = 0.0  # seconds that the unread steps took
        self.rate = 0.0
        self.began = self.stepped = time.monotonic()

    def measure(self, step: int) -> tuple[float | None, float | None]:
        """The held-out losses now, of text and of passages out of sight; keeps the weights if they are the best so far
        by text, and no worse than at the start by passages."""
        course = self.course
        if self.held_out_loss is None:
            course.best_step, course.best = step, self.weights()
            return None, None
        loss, passages = self.held_out_loss(), None if self.passage_loss is None else self.passage_loss()
        if step == 0:
            course.start_loss, course.start_passages = loss, passages
        no_worse = passages is None or course.start_passages is None or passages <= course.start_passages
        if course.best_loss is None or (loss < course.best_loss and no_worse):
            course.best_step, course.best_loss, course.best_passages = step, loss, passages
            course.best = self.weights()
        return loss, passages

    def add(self, loss: Tensor) -> None:
        """A part of the step's mean loss, on the device: of this process alone."""
        self.loss = loss if self.loss is None else self.loss + loss

    def read(self, *, measure: bool = False) -> None:
        """Read the losses of the steps since the last reading into the history; then measure the held-out loss.

        Raises DivergedError for a loss that is not finite, or far above that of the start.
        """
        if not self.unread:
            return
        began = time.monotonic()
        losses = self.world.sum_(torch.stack([loss for _, loss, _ in self.unread])).tolist()
        self.busy += time.monotonic() - began
        for (step, _, _), loss in zip(self.unread, losses, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(f"the training loss is {loss} at step {step}")
        tokens = self.tokens_per_step * len(losses)
        for (step, _, rate), loss in zip(self.unread, losses, strict=True):
            self.course.history.append(TrainPoint(step, loss, None, rate, tokens / max(self.busy, 1e-9)))
        self.unread, self.busy = [], 0.0
        self._require_no_worse()
        held_out, passages = self.measure(self.course.history[-1].step) if measure else (None, None)
        self.course.history[-1] = replace(self.course.history[-1], held_out_loss=held_out, passage_loss=passages)
        if self.progress is not None:
            fields = {"loss": losses[-1]} | ({} if held_out is None else {"held_out": held_out})
            self.progress.advance(tokens, **fields)

    def _require_no_worse(self) -> None:
        """Raise DivergedError where the last steps are far worse than the start."""
        points = [point for point in self.course.history if point.loss is not None]
        step = points[-1].step
        learned = self.learned(step)
        trained = [point.loss for point in points if point.loss is not None and self.learned(point.step) == learned]
        if len(trained) <= LAST:
            return
        held_out = 0.0 if learned or self.course.start_loss is None else self.course.start_loss
        start, now = max(trained[0], held_out), sum(trained[-LAST:]) / LAST
        if now > WORSE * max(start, NOISE):
            raise DivergedError(
                f"the mean loss of the {LAST} steps up to {step} is {now:.3g}, {start:.3g} at the start"
            )

    def stop(self, error: DivergedError, control: TrainerControl) -> None:
        """End the training with the best weights so far. Raises the error where none are better than the start."""
        if self.course.best_step == 0:
            raise error
        self.course.stopped = error.what
        self.unread, self.busy = [], 0.0
        control.should_training_stop, control.should_save = True, False

    def report(self, control: TrainerControl, loss: float | None) -> None:
        """Log a held-out loss; the Trainer still logs what it was going to at this step."""
        if self.log is not None and loss is not None:
            due = control.should_log
            self.log({"eval_loss": loss})
            control.should_log = due

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.began = self.stepped = time.monotonic()
        if state.global_step == 0:
            held_out, passages = self.measure(0)
            self.course.history.append(TrainPoint(0, None, held_out, 0.0, 0.0, passages))
            self.report(control, held_out)

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
        self.stepped = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        assert self.loss is not None
        self.busy += time.monotonic() - self.stepped
        self.unread.append((state.global_step, self.loss, self.rate))
        self.loss = None
        due = state.global_step in self.evaluate_at
        # Before weights are saved, losses are read: what is saved is not of a diverged training.
        if due or control.should_save or len(self.unread) >= self.read_every:
            try:
                self.read(measure=due)
            except DivergedError as error:
                self.stop(error, control)
            else:
                self.report(control, self.course.history[-1].held_out_loss)

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.is_world_process_zero:
            now = time.monotonic()
            self.course.seconds += now - self.began
            self.began = now
            self.course.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class DivergedError(UserError):
    """A training whose loss is not finite any more, or far above where it began."""

    def __init__(self, what: str) -> None:
        super().__init__(what, where="recover", fix="lower recover.learning_rate (try a third of it) and run again")
