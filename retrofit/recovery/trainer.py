"""transformers' Trainer with our loss: the objective of one batch, and the same on held-out text.

Legend: B batch, T tokens, N = B T rows, C model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from retrofit.recipe.schema import Recover
from retrofit.recovery.callbacks import Watch, diverged
from retrofit.recovery.objectives import distill_loss, lm_loss
from retrofit.recovery.schedule import Rows, collate
from retrofit.recovery.student_teacher import StudentTeacher, head_of, hidden_states

if TYPE_CHECKING:
    from peft import PeftModel


class Objective:
    """The loss of one batch from the student's hidden states, and the held-out loss."""

    def __init__(self, pair: StudentTeacher, recipe: Recover) -> None:
        self.pair, self.recipe = pair, recipe
        self.teacher_head = None if pair.teacher is None else head_of(pair.teacher)

    @torch.no_grad()
    def target(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor | None:
        """The teacher's hidden states [B, T, C], if there is a teacher.

        Positions that skip are the student's alone: the teacher reads the same text at 0 .. T-1, inside the window it
        knows. What it says of each token is then what the student should still say when the context lies far away.
        """
        if self.pair.teacher is None:
            return None
        documents = self.recipe.document_masking
        return hidden_states(self.pair.teacher, ids_BT, positions_BT if documents else None, documents=documents)

    def __call__(self, hidden_BTC: Tensor, ids_BT: Tensor, target_BTC: Tensor | None) -> tuple[Tensor, int]:
        """(sum over tokens of the loss, number of tokens: `count`)."""
        head, rows = head_of(self.pair.student), self.recipe.row_chunk
        if target_BTC is not None and self.teacher_head is not None:
            hidden_NC = hidden_BTC.flatten(0, 1).to(target_BTC.dtype)
            loss = distill_loss(hidden_NC, head, target_BTC.flatten(0, 1), self.teacher_head, rows)
            return loss, self.count(ids_BT)
        dtype = next(p.dtype for p in self.pair.student.parameters() if not p.requires_grad)
        hidden_NC = hidden_BTC[:, :-1].flatten(0, 1).to(dtype)
        labels_N = ids_BT[:, 1:].flatten()
        return lm_loss(hidden_NC, head, labels_N, rows), self.count(ids_BT)

    def count(self, ids_BT: Tensor) -> int:
        """Tokens that the loss of these rows is about: all, or without a teacher those that follow another."""
        return ids_BT.numel() - (0 if self.teacher_head is not None else len(ids_BT))


class RecoveryTrainer(Trainer):
    """transformers' Trainer with our loss, over packed rows in the order they come in."""

    def __init__(
        self, *, objective: Objective, compute: torch.dtype, watch: Watch | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.objective: Objective = objective
        self.compute, self.watch = compute, watch
        self.model_accepts_loss_kwargs = True  # the loss is already divided by the tokens of the whole step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Any, Any]:
        """The batches of one step, which are computed one after the other, and the tokens that its loss is about."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(self.objective.count(batch["input_ids"]) for batch in batches)
        if self.accelerator.num_processes > 1:
            return batches, self.accelerator.reduce(torch.tensor(count, device=device), "sum")
        return batches, count

    def compute_loss(  # type: ignore[override]
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        """Sum of the losses over the batch's tokens, divided by the tokens of the whole step on all processes."""
        ids_BT = inputs["input_ids"]
        loss = total_loss(self.objective, model, inputs, self.compute)
        ranks = self.accelerator.num_processes
        if ranks > 1:  # the gradients are averaged over the processes
            loss = loss * ranks
        loss = loss / (self.objective.count(ids_BT) if num_items_in_batch is None else num_items_in_batch)
        if self.watch is not None:
            self.watch.add(loss.detach())
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(cast(Any, train_dataset if train_dataset is not None else self.train_dataset))


class HeldOut:
    """Mean held-out loss per token; the teacher's hidden states are computed once and kept."""

    def __init__(self, objective: Objective, model: PeftModel, rows: Rows, compute: torch.dtype, device: str) -> None:
        self.objective: Objective = objective
        self.model, self.compute = model, compute
        self.batches = [{key: value.to(device) for key, value in rows[i].items()} for i in range(len(rows))]
        self.targets: list[Tensor | None] = []

    @torch.no_grad()
    def __call__(self) -> float:
        if not self.targets:
            self.targets = [
                self.objective.target(batch["input_ids"], batch.get("position_ids")) for batch in self.batches
            ]
        training = self.model.training
        self.model.eval()
        sums: list[Tensor] = []
        count = 0
        for batch, target in zip(self.batches, self.targets, strict=True):
            ids_BT = batch["input_ids"]
            with autocast(ids_BT.device, self.compute):
                hidden_BTC: Any = self.model(**batch)
            loss, number = self.objective(hidden_BTC, ids_BT, target)
            sums.append(loss)
            count += number
        self.model.train(training)
        total = sum(torch.stack(sums).tolist())  # read once, when all are computed
        if not math.isfinite(total):
            raise diverged(f"the held-out loss is {total}")
        return total / count


def total_loss(objective: Objective, model: torch.nn.Module, batch: dict[str, Tensor], compute: torch.dtype) -> Tensor:
    """Sum of the losses over the tokens of a batch."""
    ids_BT = batch["input_ids"]
    target_BTC = objective.target(ids_BT, batch.get("position_ids"))
    with autocast(ids_BT.device, compute):
        hidden_BTC = model(**batch)
    return objective(hidden_BTC, ids_BT, target_BTC)[0]


def trial_step(
    objective: Objective, model: PeftModel, lines: Rows, compute: torch.dtype, device: str, rows: int
) -> None:
    """One forward and backward pass of the first rows, which changes neither weights nor random numbers."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    batch = {key: value.to(device) for key, value in collate([lines[i] for i in range(rows)]).items()}
    try:
        with torch.random.fork_rng(devices):
            total_loss(objective, model, batch, compute).backward()
    finally:
        model.zero_grad(set_to_none=True)


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to `dtype`; off for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
