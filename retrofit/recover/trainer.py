"""transformers' Trainer with our loss: the objective of one batch, and the same on held-out text.

Legend: B batch, T tokens, N = B T rows, C model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer

from retrofit.errors import UserError
from retrofit.recipe.schema import Recover
from retrofit.recover.distill import distill_loss, lm_loss
from retrofit.recover.pair import Pair, head_of, hidden_states
from retrofit.recover.watch import Watch

if TYPE_CHECKING:
    from peft import PeftModel


class Objective:
    """The loss of one batch from the student's hidden states, and the held-out loss."""

    def __init__(self, pair: Pair, recipe: Recover) -> None:
        self.pair, self.recipe = pair, recipe
        self.teacher_head = None if pair.teacher is None else head_of(pair.teacher)

    @torch.no_grad()
    def target(self, ids_BT: Tensor) -> Tensor | None:
        """The teacher's hidden states [B, T, C], if there is a teacher."""
        return None if self.pair.teacher is None else hidden_states(self.pair.teacher, ids_BT)

    def __call__(self, hidden_BTC: Tensor, ids_BT: Tensor, target_BTC: Tensor | None) -> tuple[Tensor, int]:
        """(sum over tokens of the loss, number of tokens)."""
        head, rows = head_of(self.pair.student), self.recipe.row_chunk
        if target_BTC is not None and self.teacher_head is not None:
            hidden_NC = hidden_BTC.flatten(0, 1).to(target_BTC.dtype)
            loss = distill_loss(hidden_NC, head, target_BTC.flatten(0, 1), self.teacher_head, rows)
            return loss, ids_BT.numel()
        dtype = next(p.dtype for p in self.pair.student.parameters() if not p.requires_grad)
        hidden_NC = hidden_BTC[:, :-1].flatten(0, 1).to(dtype)
        labels_N = ids_BT[:, 1:].flatten()
        return lm_loss(hidden_NC, head, labels_N, rows), labels_N.numel()


class RecoveryTrainer(Trainer):
    """transformers' Trainer with our loss, over packed rows in the order they come in."""

    def __init__(
        self, *, objective: Objective, compute: torch.dtype, watch: Watch | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.objective: Objective = objective
        self.compute, self.watch = compute, watch
        self.model_accepts_loss_kwargs = True  # the loss is already divided by the tokens of the whole step

    def compute_loss(  # type: ignore[override]
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """Sum of the losses over the step's tokens on all processes, divided by their number."""
        ids_BT = inputs["input_ids"]
        target_BTC = self.objective.target(ids_BT)
        with autocast(ids_BT.device, self.compute):
            hidden_BTC = model(input_ids=ids_BT)
        total, count = self.objective(hidden_BTC, ids_BT, target_BTC)
        ranks = self.accelerator.num_processes
        if ranks > 1:  # the gradients are averaged over the processes
            counts = self.accelerator.reduce(torch.tensor(count, device=total.device), "sum")
            loss = total * ranks / cast(Tensor, counts)
        else:
            loss = total / count
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _diverged(f"the training loss is {value} at step {self.state.global_step + 1}")
        if self.watch is not None:
            self.watch.loss = value
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(cast(Any, train_dataset if train_dataset is not None else self.train_dataset))


class Rows(Dataset):
    """Packed rows of token ids [N, T]."""

    def __init__(self, tokens_NT: Tensor) -> None:
        self.tokens_NT = tokens_NT

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens_NT[index]}


class HeldOut:
    """Mean held-out loss per token; the teacher's hidden states are computed once and kept."""

    def __init__(self, objective: Objective, model: PeftModel, tokens_NT: Tensor, compute: torch.dtype) -> None:
        self.objective: Objective = objective
        self.model, self.tokens_NT, self.compute = model, tokens_NT, compute
        self.targets: list[Tensor | None] = []

    @torch.no_grad()
    def __call__(self) -> float:
        if not self.targets:
            self.targets = [self.objective.target(row[None]) for row in self.tokens_NT]
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        for row, target in zip(self.tokens_NT, self.targets, strict=True):
            with autocast(row.device, self.compute):
                hidden_BTC: Any = self.model(input_ids=row[None])
            loss, number = self.objective(hidden_BTC, row[None], target)
            total, count = total + float(loss), count + number
        self.model.train(training)
        if not math.isfinite(total):
            raise _diverged(f"the held-out loss is {total}")
        return total / count


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to `dtype`; off for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _diverged(what: str) -> UserError:
    return UserError(what, where="recover", fix="lower recover.learning_rate (try a third of it) and run again")
