"""A small training loop for what recovery does not have: losses by layer, few logits of the teacher, averaged weights.

Legend: B batch, T tokens, N = B T rows, R rows of a chunk, V vocabulary, C model width, k logits that are kept.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from evals.benchmarks import objectives
from retrofit.model.folder import ModelFolder, opened
from retrofit.recovery.adapters import default_rate, trainable
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.objectives import _apply, logits_of
from retrofit.recovery.schedule import training_lines
from retrofit.recovery.student_teacher import (
    StudentTeacher,
    autocast,
    body,
    compute_dtype,
    head_of,
    load_student_teacher,
)
from retrofit.recovery.train import student_with_adapters
from retrofit.recovery.trainer import Objective

if TYPE_CHECKING:
    from peft import PeftModel

WARMUP, CLIP = 0.05, 1.0
LAST = "last"
ENDINGS = {"last quarter": 0.25, "last half": 0.5}
"""Shares of the steps whose weights are averaged."""


@dataclass(frozen=True)
class Trial:
    """A training on the logits, after a share of the steps (`first`) on `match`.

    top: logits of the teacher that are kept (None: all); rest: with all others as one, else without them. falls: the
    rate falls to zero. averaged: also the average weights of the last steps. full: attention's weights in full, at this
    share of the rate. seed: of the adapters.
    """

    words: str
    first: float = 0.0
    match: Literal["attention", "hidden"] = "attention"
    top: int | None = None
    rest: bool = True
    falls: bool = True
    averaged: bool = False
    full: float | None = None
    seed: int = 0


class TopTokens:
    """KL of a student from a teacher of whom k log-probabilities a token are known, for rows of student logits.

    Over k + 1 outcomes: the k tokens, and any other one (r); sum_k t log(t / s) + r_t log(r_t / r_s). The gradient by
    the logits is s - t on the k tokens and s (1 - r_t / r_s) on the others. rest=False: both distributions are of the
    k tokens alone, so that the others have no gradient.
    """

    def __init__(self, log_t_Nk: Tensor, index_Nk: Tensor, rest: bool = True) -> None:
        self.all = log_t_Nk, index_Nk
        self.log_t_Rk, self.index_Rk = self.all
        self.rest = rest

    def begin(self, start: int, stop: int) -> None:
        """The rows of the chunk that comes next."""
        self.log_t_Rk, self.index_Rk = (tensor[start:stop] for tensor in self.all)

    def __call__(self, rows: slice, logits_RV: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
        log_t, index = self.log_t_Rk[rows].float(), self.index_Rk[rows].long()
        if not self.rest:
            log_t, log_s = log_t.log_softmax(-1), logits_RV.gather(1, index).float().log_softmax(-1)
            loss = (log_t.exp() * (log_t - log_s)).sum()
            gradient = torch.zeros_like(logits_RV, dtype=torch.float32).scatter_(1, index, log_s.exp() - log_t.exp())
            return loss, gradient if grad else None
        log_s = logits_RV.log_softmax(-1, dtype=torch.float32)
        known, t = log_s.gather(1, index), log_t.exp()
        s = known.exp()
        rest_t, rest_s = ((1 - p.sum(-1, keepdim=True)).clamp(min=1e-6) for p in (t, s))
        loss = (t * (log_t - known)).sum() + (rest_t * (rest_t / rest_s).log()).sum()
        return loss, log_s.exp_().mul_(1 - rest_t / rest_s).scatter_(1, index, s - t) if grad else None


class Loop:
    """Student, teacher, and one step of each kind."""

    def __init__(self, work: Path, trial: Trial, original: ModelFolder) -> None:
        variant = objectives.VARIANTS["rows-256"]
        recipe, rows, _ = objectives.rows_of(work, variant, original)
        if trial.full is not None:
            recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"attention": False})})
        self.trial, self.folder, self.compute = trial, opened(objectives.converted(work)), compute_dtype("cpu")
        lines = training_lines(rows, recipe, self.folder.spec.max_position_embeddings, 0)
        self.pair: StudentTeacher = load_student_teacher(
            self.folder, original, device="cpu", dtype=self.compute, kernel="auto"
        )
        self.model: PeftModel = student_with_adapters(self.pair, recipe, trial.seed)
        self.in_full: list[nn.Parameter] = []
        if trial.full is not None:
            self.in_full = [p for layer in _layers(self.pair.student) for p in layer.self_attn.parameters()]
            for parameter in self.in_full:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self.objective = Objective(self.pair, recipe)
        batches = MicroBatches(lines, recipe.batch_size, every_token=True)
        self.batches: list[Tensor] = [batches[step]["input_ids"] for step in range(len(batches))]
        self.rate = default_rate(self.pair.spec, self.pair.teacher_spec)
        self.teacher_seconds = 0.0  # for what need not be computed again where it is kept
        self.mass = 0.0  # of the logits that are kept, mean over tokens

    def optimizer(self) -> torch.optim.AdamW:
        """Adam as recovery has it."""
        taken = set(map(id, self.in_full))
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        groups = [{"params": rest, "share": 1.0}, {"params": self.in_full, "share": self.trial.full}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, weight_decay=0.0)

    def logits(self, ids_BT: Tensor) -> None:
        """Gradient of the divergence on the logits, all of them or the highest."""
        began = time.process_time()
        target_BTC = cast(Tensor, self.objective.target(ids_BT))
        kept = None if self.trial.top is None else highest(self.pair, target_BTC.flatten(0, 1), self.trial.top)
        self.teacher_seconds += time.process_time() - began
        with self._autocast():
            hidden_BTC = self.model(input_ids=ids_BT)
        if kept is None:
            loss = self.objective(hidden_BTC, None, target_BTC)
        else:
            self.mass += float(kept[0].float().exp().sum(-1).mean()) / len(self.batches)
            rule = cast(Any, TopTokens(*kept, self.trial.rest))
            hidden_NC = hidden_BTC.flatten(0, 1).to(target_BTC.dtype)
            loss = _apply(hidden_NC, head_of(self.pair.student), self.objective.recipe.row_chunk, rule)
        (loss / ids_BT.numel()).backward()

    def attention(self, ids_BT: Tensor) -> None:
        """Gradient of the relative squared error of attention's output, each layer on the original's inputs.

        LoLCATs (arXiv:2410.10254, eq. 6): no gradient passes from a layer to another.
        """
        teacher, student = (_layers(model) for model in (self.pair.teacher, self.pair.student))

        def hook(own: nn.Module) -> Any:
            def match(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
                with torch.enable_grad():
                    with self._autocast():
                        output_BTC = own(*inputs, **named)[0].float()
                    target_BTC = outputs[0].float()
                    error = (output_BTC - target_BTC).square().mean() / target_BTC.square().mean()
                    (error / len(teacher)).backward()

            return match

        pairs = zip(teacher, student, strict=True)
        hooks = [one.self_attn.register_forward_hook(hook(two.self_attn), with_kwargs=True) for one, two in pairs]
        self.objective.target(ids_BT)
        for handle in hooks:
            handle.remove()

    def hidden(self, ids_BT: Tensor) -> None:
        """Gradient of the relative squared error of every layer's output by token, on the student's own stream."""
        how = {"input_ids": ids_BT, "use_cache": False, "output_hidden_states": True}
        with torch.no_grad():
            target = body(cast(Any, self.pair.teacher))(**how).hidden_states[1:]
        with self._autocast():
            streams = body(self.pair.student)(**how).hidden_states[1:]
        errors = [
            ((own.float() - other.float()).square().sum(-1) / other.float().square().sum(-1)).mean()
            for own, other in zip(streams, target, strict=True)
        ]
        torch.stack(errors).mean().backward()

    def _autocast(self) -> Any:
        return autocast(torch.device("cpu"), self.compute)

    def train(self) -> dict[str, dict[str, Tensor]]:
        """{ending: weights} after all steps."""
        steps = len(self.batches)
        turn = round(self.trial.first * steps)
        sums: dict[str, dict[str, Tensor]] = {}
        for begin, stop in [(0, turn), (turn, steps)]:  # Adam begins anew with another loss
            optimizer, warmup = self.optimizer(), math.ceil(WARMUP * (stop - begin))
            for step in range(begin, stop):
                rising = min(1.0, (step - begin) / max(1, warmup))
                falling = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / (steps - warmup)))
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * group["share"] * rising * (falling if self.trial.falls else 1.0)
                objective = getattr(self, self.trial.match) if step < turn else self.logits
                objective(self.batches[step])
                torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for ending, share in ENDINGS.items() if self.trial.averaged else ():
                    if step >= steps - round(share * steps):
                        count = round(share * steps)
                        sums[ending] = added(sums.get(ending), trainable(self.model), count)
        return {LAST: trainable(self.model), **sums}


def _layers(model: Any) -> Any:
    return body(model).layers


def added(total: dict[str, Tensor] | None, weights: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """total + weights / count."""
    parts = {name: value / count for name, value in weights.items()}
    return parts if total is None else {name: value.add_(parts[name]) for name, value in total.items()}


@torch.no_grad()
def highest(pair: StudentTeacher, hidden_NC: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities, ids) of the teacher's highest logits [N, k], as they would be kept: 6 bytes a token and k."""
    logits_NV = logits_of(hidden_NC, head_of(cast(Any, pair.teacher))).float()
    values, index = logits_NV.topk(top, sorted=False)
    return (values - logits_NV.logsumexp(-1, keepdim=True)).half(), index.int()
