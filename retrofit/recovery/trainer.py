"""transformers' Trainer with our loss: the objective of one batch, and the same on held-out text.

Legend: B batch, T tokens, N = B T rows, C model width.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from retrofit.recipe.schema import Recover
from retrofit.recovery.adapters import sinks
from retrofit.recovery.batches import LEARNED, WEIGHTS, MicroBatches
from retrofit.recovery.callbacks import DivergedError
from retrofit.recovery.checkpoints import load_optimizer, load_weights, save_optimizer, save_weights
from retrofit.recovery.objectives import IGNORED, distill_loss, lm_loss
from retrofit.recovery.on_policy import Writer
from retrofit.recovery.schedule import TrainRows
from retrofit.recovery.sequence import PLACES, Sharing, Whole
from retrofit.recovery.sharding import split_again
from retrofit.recovery.student_teacher import StudentTeacher, autocast, head_of, hidden_states
from retrofit.system.device import float64
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from peft import PeftModel

SCHEDULER = "scheduler.pt"
SINK_RATE = 10.0
"""The learning rate of sinks over that of the adapters. Adam moves a number by about its rate in a step; adapters
change scores by products of two matrices, and a sink is one score alone."""


class Objective:
    """The loss of one batch from the student's hidden states, and the held-out loss."""

    def __init__(self, pair: StudentTeacher, recipe: Recover, sharing: Sharing | None = None) -> None:
        self.pair, self.recipe, self.sharing = pair, recipe, sharing or Whole()
        self.sinks = tuple(f".{name}" for name in sinks(recipe.adapter, pair.spec))

    @torch.no_grad()
    def target(
        self, ids_BT: Tensor, positions_BT: Tensor | None = None, places_BT: Tensor | None = None
    ) -> Tensor | None:
        """The teacher's hidden states [B, T, C], if there is a teacher.

        Positions that skip are the student's alone: the teacher reads the same text at 0 .. T-1, inside the window it
        knows. What it says of each token is then what the student should still say when the context lies far away. Rows
        longer than that window are never asked about: they are learned from the text.
        places_BT: where the tokens of a share stand, of rows that several processes share.
        """
        if self.pair.teacher is None:
            return None
        documents = self.recipe.document_masking
        return hidden_states(self.pair.teacher, ids_BT, positions_BT if documents else places_BT, documents=documents)

    def __call__(
        self,
        hidden_BTC: Tensor,
        labels_BT: Tensor | None,
        target_BTC: Tensor | None,
        weights_BT: Tensor | None = None,
    ) -> Tensor:
        """Sum of the loss over the tokens whose label is not IGNORED; over all of them where there are no labels.

        weights_BT: of a language model's loss, which has no target.
        """
        head, rows = head_of(self.pair.student), self.recipe.row_chunk
        if target_BTC is not None and self.pair.teacher is not None:
            hidden_NC = hidden_BTC.flatten(0, 1).to(target_BTC.dtype)
            ignored_N = None if labels_BT is None else labels_BT.flatten() == IGNORED
            teacher_head = head_of(self.pair.teacher)
            target_NC, divergence = target_BTC.flatten(0, 1), self.recipe.divergence
            return distill_loss(hidden_NC, head, target_NC, teacher_head, rows, ignored_N, divergence)
        assert labels_BT is not None
        dtype = next(p.dtype for p in self.pair.student.parameters() if not p.requires_grad)
        weights_N = None if weights_BT is None else weights_BT.flatten()
        return lm_loss(hidden_BTC.flatten(0, 1).to(dtype), head, labels_BT.flatten(), rows, weights_N)


class Losses(Protocol):
    """What records the losses of a training."""

    def add(self, loss: Tensor) -> None:
        """A part of the step's mean loss, on the device: of this process alone."""


class RecoveryTrainer(Trainer):
    """transformers' Trainer with our loss, over the micro-batches of this process in the order they come in.

    seed: of the adapters' dropout, which is drawn anew for each micro-batch from its step and first row; None without
    dropout. writer: of the rows that the student writes itself.
    """

    train_dataset: MicroBatches

    def __init__(
        self,
        *,
        objective: Objective,
        compute: torch.dtype,
        watch: Losses | None = None,
        writer: Writer | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.objective: Objective = objective
        self.compute, self.watch, self.seed, self.writer = compute, watch, seed, writer
        self.model_accepts_loss_kwargs = True  # the loss is already divided by the tokens of the whole step
        self.loss_is_scaled_for_ga = True

    def compute_loss(  # type: ignore[override]
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """This process's share of the step's loss: a sum over tokens, divided by those of all processes.

        The engine averages gradients over processes where a sum is wanted, hence the factor.
        """
        tokens, row, labels_BT = inputs.pop("tokens"), inputs.pop("row"), inputs.pop("next_ids", None)
        if self.seed is not None:
            torch.manual_seed(hash((self.seed, self.state.global_step, row)) & (2**63 - 1))
        loss = total_loss(self.objective, model, inputs, labels_BT, self.compute) / tokens
        if self.watch is not None:
            self.watch.add(loss.detach())
        return loss * self.accelerator.num_processes

    def training_step(  # type: ignore[override]
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward pass of one micro-batch, of whose tokens this process may have a share."""
        sharing = self.objective.sharing
        if self.writer is not None:
            inputs = self.writer(self.state.global_step, inputs)
        share = sharing.share(inputs)
        with sharing.attention(inputs["input_ids"].shape[1]):
            return super().training_step(model, share, num_items_in_batch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, in which sinks have a rate of their own and do not decay: they are logits, not weights."""
        again = self.optimizer is not None
        made: torch.optim.Optimizer = super().create_optimizer(model)
        trained = self._trained() if model is None else model
        own = [p for name, p in trained.named_parameters() if p.requires_grad and name.endswith(self.objective.sinks)]
        if own and not again:
            taken = set(map(id, own))
            for group in made.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in taken]
            rate = SINK_RATE * self.args.learning_rate
            made.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return made

    def _prepare_context_parallel_inputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Rows are shared out already, whatever accelerate is configured to do."""
        return nullcontext, inputs

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches as they are: they are dealt out already."""
        return one_by_one(self.train_dataset)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, and nothing of the frozen model, into the folder."""
        save_weights(self._trained(), Path(output_dir or str(self.args.output_dir)), main=self.is_world_process_zero())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        main = self.is_world_process_zero()
        save_optimizer(self._trained(), self._plain_optimizer(), Path(output_dir), main=main)
        if main:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """It is where it computes already, or its parts are."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Do nothing: no random state is carried from one step to the next."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(self._trained(), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self._trained(), self._plain_optimizer(), Path(checkpoint))
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _trained(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self.model)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))


class HeldOut:
    """Mean held-out loss per token, the same number on all processes; the teacher's hidden states are kept.

    batches: this process's share; all of them have as many.
    """

    def __init__(
        self,
        objective: Objective,
        model: PeftModel,
        batches: MicroBatches,
        compute: torch.dtype,
        device: str,
        world: World = ALONE,
    ) -> None:
        self.objective: Objective = objective
        self.model, self.compute, self.world = model, compute, world
        self.tokens = sum(batches[index]["tokens"] for index in range(0, len(batches), batches.per_step))
        self.batches, self.lengths = [], []
        for index in range(len(batches)):
            item = batches[index]
            batch = {key: value.to(device) for key, value in item.items() if isinstance(value, Tensor)}
            self.batches.append(objective.sharing.share({**batch, LEARNED: item[LEARNED]}))
            self.lengths.append(batch["input_ids"].shape[1])
        self.targets: list[Tensor | None] = []

    @torch.no_grad()
    def __call__(self) -> float:
        sharing = self.objective.sharing
        every = list(zip(self.batches, self.lengths, strict=True))
        if not self.targets:
            for batch, length in every:
                with sharing.attention(length):
                    places, learned = batch.pop(PLACES, None), batch.pop(LEARNED)
                    given = batch["input_ids"], batch.get("position_ids"), places
                    self.targets.append(None if learned else self.objective.target(*given))
        training = self.model.training
        self.model.eval()
        sums: list[Tensor] = []
        for (batch, length), target in zip(every, self.targets, strict=True):
            inputs = {key: value for key, value in batch.items() if key != "next_ids"}
            with sharing.attention(length), autocast(batch["input_ids"].device, self.compute):
                hidden_BTC: Any = self.model(**inputs)
            sums.append(self.objective(hidden_BTC, batch.get("next_ids"), target))
        self.model.train(training)
        split_again(self.model)
        loss = float(self.world.sum_(float64(torch.stack(sums)).sum()))  # read once, when all are computed
        if not math.isfinite(loss):
            raise DivergedError(f"the held-out loss is {loss}")
        return loss / self.tokens


def total_loss(
    objective: Objective,
    model: torch.nn.Module,
    inputs: dict[str, Any],
    labels_BT: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    """Sum of the losses over the tokens of a batch. inputs: ids, positions where they are not 0 .. T-1, and whether it
    is learned from the text rather than from the teacher, with the weights of its tokens."""
    ids_BT, places_BT, learned = inputs["input_ids"], inputs.pop(PLACES, None), inputs.pop(LEARNED, False)
    weights_BT = inputs.pop(WEIGHTS, None)
    target_BTC = None if learned else objective.target(ids_BT, inputs.get("position_ids"), places_BT)
    with autocast(ids_BT.device, compute):
        hidden_BTC = model(**inputs)
    return objective(hidden_BTC, labels_BT, target_BTC, weights_BT)


def trial_step(
    objective: Objective, model: PeftModel, lines: TrainRows, compute: torch.dtype, device: str, rows: int
) -> None:
    """One forward and backward pass of the first rows, which changes neither weights nor random numbers.

    Beside it stands what a training keeps later: Adam's two moments of what is trained, and the best state so far.
    """
    later = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(3)]
    devices = [torch.device(device)] if device.startswith("cuda") else []
    item = MicroBatches(lines, rows, every_token=objective.pair.teacher is not None)[0]
    batch: dict[str, Any] = {key: value.to(device) for key, value in item.items() if isinstance(value, Tensor)}
    batch[LEARNED], labels_BT = item[LEARNED], batch.pop("next_ids", None)
    try:
        with torch.random.fork_rng(devices):
            total_loss(objective, model, batch, labels_BT, compute).backward()
    finally:
        model.zero_grad(set_to_none=True)
        del later


def one_by_one(batches: MicroBatches) -> DataLoader:
    """A loader that gives out the items of a data set as they are, in their order."""
    return DataLoader(batches, batch_size=1, sampler=SequentialSampler(cast(Any, batches)), collate_fn=_only)


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    [item] = items
    return item
