"""Divergences of the student's next-token distribution from the teacher's, each with its gradient.

With t the teacher's and s the student's distribution and z the student's logits, per token:

- forward: KL(t || s) = sum t log(t / s); its gradient by z is s - t. The student spreads over all that the teacher says
  (Hinton et al. 2015, arXiv:1503.02531, eq. 2 at temperature 1).
- reverse: KL(s || t) = sum s log(s / t); its gradient is s (log(s / t) - KL). The student keeps to what it can say
  (Gu et al. 2023, MiniLLM, arXiv:2306.08543, eq. 1, here token by token).
- jsd: the generalised Jensen-Shannon divergence at 0.5, (KL(t || m) + KL(s || m)) / 2 with m = (t + s) / 2; its
  gradient is s (log(s / m) - KL(s || m)) / 2 (Agarwal et al. 2023, GKD, arXiv:2306.13649, eq. 1). At most log 2.

Legend: R rows (tokens), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from retrofit.recipe.recovery import Divergence

Rule = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(log t [R, V], log s [R, V], whether the gradient is wanted) -> (sum over tokens in nats, gradient [R, V] by the
student's logits). float32; the two inputs are overwritten."""


def forward_kl(log_t: Tensor, log_s: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of KL(t || s)."""
    p_t = log_t.exp()
    loss = torch.dot(p_t.view(-1), log_t.sub_(log_s).view(-1))
    return loss, log_s.exp_().sub_(p_t) if grad else None


def reverse_kl(log_t: Tensor, log_s: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of KL(s || t)."""
    p_s = log_s.exp()
    ratio = log_s.sub_(log_t)
    if not grad:
        return torch.dot(p_s.view(-1), ratio.view(-1)), None
    ratio.mul_(p_s)
    loss_R1 = ratio.sum(-1, keepdim=True)
    return loss_R1.sum(), ratio.sub_(p_s.mul_(loss_R1))


def jensen_shannon(log_t: Tensor, log_s: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the Jensen-Shannon divergence at 0.5."""
    log_m = torch.logaddexp(log_t, log_s).sub_(math.log(2))
    p_t, p_s = log_t.exp(), log_s.exp()
    of_teacher = torch.dot(p_t.view(-1), log_t.sub_(log_m).view(-1))
    part = log_s.sub_(log_m).mul_(p_s)
    of_student_R1 = part.sum(-1, keepdim=True)
    loss = (of_teacher + of_student_R1.sum()) / 2
    return loss, part.sub_(p_s.mul_(of_student_R1)).div_(2) if grad else None


RULES: dict[Divergence, Rule] = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon}
