"""Distillation and language-model losses from hidden states, without a tokens x vocabulary tensor.

The output head is applied to `row_chunk` rows at a time and the gradient is formed in the same pass, so that neither
logits nor their gradient exist for more rows than that. Inside a chunk the log-softmax runs in float32, on a CPU on a
few rows at a time, small enough to stay in the processor's cache.

Legend: N rows (tokens), C model width, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrofit.recipe.recovery import Divergence
from retrofit.recovery.divergences import RULES, Rule
from retrofit.system.device import logits_at_a_time

IGNORED = -100  # a label that the loss does not count
CACHE_VALUES = 262_144  # float32 values of one tensor that are worked on at a time: 1 MiB, half of a common L2 cache


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (h W^T + bias) / softcap), without the tanh if softcap is None.

    weight: [V, C]. scale: `logit_scale` (Cohere) or 1 / `logits_scaling` (Granite).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def distill_loss(
    student_NC: torch.Tensor,
    student: Head,
    teacher_NC: torch.Tensor,
    teacher: Head,
    row_chunk: int = 512,
    ignored_N: torch.Tensor | None = None,
    divergence: Divergence = "forward",
) -> torch.Tensor:
    """Sum over tokens of a divergence of the student from the teacher on the vocabulary, in nats (float32 scalar).

    ignored_N: tokens that do not count (bool), whose logits are not computed; None where all do. Divide by the global
    number of those that do.
    divergence: of `divergences`, by default KL(teacher || student). Gradients flow to the student's hidden states and,
    where they require it, to its head's weight and bias.
    """
    assert student_NC.shape[0] == teacher_NC.shape[0]

    if ignored_N is not None:
        counted = (~ignored_N).nonzero()[:, 0]
        student_NC, teacher_NC = student_NC.index_select(0, counted), teacher_NC.index_select(0, counted)
    rule = _Distill(teacher_NC.detach(), teacher, row_chunk, RULES[divergence])
    return _apply(student_NC, student, row_chunk, rule)


def lm_loss(
    hidden_NC: torch.Tensor,
    head: Head,
    labels_N: torch.Tensor,
    row_chunk: int = 512,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over tokens of -log p(label), in nats (float32 scalar); labels are shifted, IGNORED ones do not count.

    weights_N: what each token's loss is multiplied with, by default 1. Divide by the sum of those that count.
    """
    assert hidden_NC.shape[0] == labels_N.shape[0]
    return _apply(hidden_NC, head, row_chunk, _NextToken(labels_N, weights_N))


@torch.no_grad()
def token_losses(hidden_NC: torch.Tensor, head: Head, labels_N: torch.Tensor, row_chunk: int = 512) -> torch.Tensor:
    """-log p(label) of every token, in nats: float32 [N]; labels are shifted."""
    head = _detached(head, hidden_NC.dtype)
    buffer_RV, found = _buffer(hidden_NC, head, row_chunk), []
    step = logits_at_a_time(str(hidden_NC.device), row_chunk, head.weight.shape[0], CACHE_VALUES)
    for start in range(0, len(hidden_NC), row_chunk):
        logits_RV = _raw_logits(hidden_NC[start : start + row_chunk], head, buffer_RV)
        for row in range(0, len(logits_RV), step):
            log_p = torch.log_softmax(_shape_logits(logits_RV[row : row + step], head), -1, dtype=torch.float32)
            found.append(-log_p.gather(1, labels_N[start + row : start + row + len(log_p), None])[:, 0])
    return torch.cat(found)


def logits_of(hidden_NC: torch.Tensor, head: Head) -> torch.Tensor:
    """All logits [N, V] of a few rows."""
    head = _detached(head, hidden_NC.dtype)
    return _shape_logits(_raw_logits(hidden_NC, head, _buffer(hidden_NC, head, len(hidden_NC))), head)


class _Distill:
    """Loss and gradient of a divergence from the teacher for rows of student logits."""

    def __init__(self, teacher_NC: torch.Tensor, teacher: Head, row_chunk: int, divergence: Rule) -> None:
        self.divergence = divergence
        self.teacher_NC, self.teacher = teacher_NC, _detached(teacher, teacher_NC.dtype)
        self.buffer_RV = _buffer(teacher_NC, teacher, row_chunk)
        self.target_RV = self.buffer_RV

    def begin(self, start: int, stop: int) -> None:
        self.target_RV = _raw_logits(self.teacher_NC[start:stop], self.teacher, self.buffer_RV)

    def __call__(self, rows: slice, logits_RV: torch.Tensor, grad: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        log_t = torch.log_softmax(_shape_logits(self.target_RV[rows], self.teacher), -1, dtype=torch.float32)
        log_s = torch.log_softmax(logits_RV, -1, dtype=torch.float32)
        return self.divergence(log_t, log_s, grad)


class _NextToken:
    """Loss and gradient of the cross-entropy with the next token for rows of logits."""

    def __init__(self, labels_N: torch.Tensor, weights_N: torch.Tensor | None = None) -> None:
        self.labels_N, self.weights_N = labels_N, weights_N
        self.labels_R, self.weights_R = labels_N, weights_N

    def begin(self, start: int, stop: int) -> None:
        self.labels_R = self.labels_N[start:stop]
        self.weights_R = None if self.weights_N is None else self.weights_N[start:stop]

    def __call__(self, rows: slice, logits_RV: torch.Tensor, grad: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        log_s = torch.log_softmax(logits_RV, -1, dtype=torch.float32)
        ignored_R1 = self.labels_R[rows, None] == IGNORED
        index_R1 = self.labels_R[rows, None].masked_fill(ignored_R1, 0)
        losses_R1 = -log_s.gather(1, index_R1).masked_fill(ignored_R1, 0)
        weights_R1 = None if self.weights_R is None else self.weights_R[rows, None]
        loss = (losses_R1 if weights_R1 is None else losses_R1 * weights_R1).sum()
        if not grad:
            return loss, None
        grad_RV = log_s.exp_()
        grad_RV.scatter_add_(1, index_R1, torch.full_like(index_R1, -1, dtype=grad_RV.dtype))
        if weights_R1 is not None:
            grad_RV.mul_(weights_R1)
        return loss, grad_RV.masked_fill_(ignored_R1, 0)


def _apply(hidden_NC: torch.Tensor, head: Head, row_chunk: int, rule: _Distill | _NextToken) -> torch.Tensor:
    tensors = [hidden_NC, head.weight] + ([] if head.bias is None else [head.bias])
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    loss: torch.Tensor = _ChunkedHead.apply(hidden_NC, head.weight, head.bias, head, row_chunk, rule, grad)
    return loss


class _ChunkedHead(torch.autograd.Function):
    """Head and loss in row chunks; the gradients are made in the forward and only scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, bias_V, head, row_chunk, rule, grad):  # type: ignore[no-untyped-def]
        dtype = hidden_NC.dtype
        head = _detached(head, dtype)
        buffer_RV = _buffer(hidden_NC, head, row_chunk)
        wanted = [grad and need for need in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden_NC) if wanted[0] else None
        d_weight = torch.zeros_like(weight_VC, dtype=torch.float32) if wanted[1] else None
        d_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        step = logits_at_a_time(str(hidden_NC.device), row_chunk, head.weight.shape[0], CACHE_VALUES)
        for start in range(0, len(hidden_NC), row_chunk):
            h_RC = hidden_NC[start : start + row_chunk]
            logits_RV = _raw_logits(h_RC, head, buffer_RV)
            rule.begin(start, start + len(h_RC))
            for row in range(0, len(h_RC), step):
                rows = slice(row, min(row + step, len(h_RC)))
                shaped = _shape_logits(logits_RV[rows], head)
                value, gradient = rule(rows, shaped, grad)
                loss += value
                if gradient is not None:
                    logits_RV[rows] = _unshape_gradient(gradient, shaped, head)
            if d_hidden is not None:
                torch.mm(logits_RV, head.weight, out=d_hidden[start : start + len(h_RC)])
            if d_weight is not None:
                d_weight += logits_RV.T @ h_RC
            if d_bias is not None:
                d_bias += logits_RV.sum(0, dtype=torch.float32)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype)
        return loss

    @staticmethod
    def backward(ctx, *outputs):  # type: ignore[no-untyped-def]
        scaled = [
            None if gradient is None else (gradient * outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _detached(head: Head, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Head(head.weight.detach().to(dtype), bias, head.scale, head.softcap)


def _buffer(hidden_NC: torch.Tensor, head: Head, row_chunk: int) -> torch.Tensor:
    """Room for the logits of one chunk, used again for every chunk: fresh memory costs as much as a pass over it."""
    return hidden_NC.new_empty(min(row_chunk, len(hidden_NC)), head.weight.shape[0])


def _raw_logits(h_RC: torch.Tensor, head: Head, buffer_RV: torch.Tensor) -> torch.Tensor:
    """h W^T + bias, before scale and softcap, into the buffer."""
    out_RV = buffer_RV[: len(h_RC)]
    if head.bias is None:
        return torch.mm(h_RC, head.weight.T, out=out_RV)
    return torch.addmm(head.bias, h_RC, head.weight.T, out=out_RV)


def _shape_logits(raw_RV: torch.Tensor, head: Head) -> torch.Tensor:
    """Scale and softcap, in float32 where there is either."""
    if head.scale != 1.0:
        raw_RV = raw_RV.float() * head.scale
    if head.softcap is not None:
        raw_RV = torch.tanh(raw_RV.float() / head.softcap) * head.softcap
    return raw_RV


def _unshape_gradient(gradient_RV: torch.Tensor, shaped_RV: torch.Tensor, head: Head) -> torch.Tensor:
    """Chain rule through softcap and scale; `shaped_RV` are the logits after both."""
    if head.softcap is not None:
        gradient_RV = gradient_RV * (1 - (shaped_RV / head.softcap) ** 2)
    return gradient_RV * head.scale if head.scale != 1.0 else gradient_RV
