"""Attention sinks: one learned logit for each query head that takes probability and gives no value.

With the logit b_h of head h, the probability of key j is p_ij = exp(s_ij) / (sum_j exp s_ij + exp b_h): a softmax with
one more column, whose value is zero (Agarwal et al. 2025, gpt-oss model card, arXiv 2508.10925, section 2.1). What a
kernel without sinks gives is enough for it: out times sigmoid(lse - b_h), and the log-sum-exp over that column too. The
gradients of queries, keys and values are those of any flash kernel that is given this out and this log-sum-exp.

Legend: B batch, H query heads, T queries, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out_BHTD: Tensor, lse_BHT: Tensor, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of the softmax with the sinks' column, from those without it; unchanged where there are no sinks."""
    if sinks_H is None:
        return out_BHTD, lse_BHT
    sinks_H1 = sinks_H.to(lse_BHT.dtype)[:, None]
    share_BHT1 = torch.sigmoid(lse_BHT - sinks_H1)[..., None]
    return (out_BHTD * share_BHT1).to(out_BHTD.dtype), torch.logaddexp(lse_BHT, sinks_H1)


def sink_gradient(grad_BHTD: Tensor, out_BHTD: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    """The gradient [H] of the sinks, from the out and lse that `with_sinks` gave and the gradient of that out.

    -sum_i (dO_i . O_i) exp(b_h - lse_i): the column's value is zero, so its score has the gradient P (0 - dO . O).
    """
    delta_BHT = (grad_BHTD.to(lse_BHT.dtype) * out_BHTD.to(lse_BHT.dtype)).sum(-1)
    share_BHT = torch.exp(sinks_H.to(lse_BHT.dtype)[:, None] - lse_BHT)
    return -(delta_BHT * share_BHT).sum((0, 2)).to(sinks_H.dtype)
