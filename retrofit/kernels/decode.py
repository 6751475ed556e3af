"""Attention of one new token over a cache of fixed size: static shapes and no wait for the host, for CUDA graphs.

transformers' sdpa repeats the keys and values of grouped-query attention whenever there is a mask, which a cache of
fixed size needs: every token would then read and write the cache once per query head. Here the query heads that share
a KV head are the rows of one matrix product, so that keys and values are read once (Shazeer 2019, arXiv 1911.02150).

Legend: B batch, H query heads, K KV heads (H = s K), S slots of the cache, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retrofit.errors import UserError

NAME = "retrofit_decode"


def attention(
    q_BH1D: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    visible_S: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the slots that are visible -> out [B, H, 1, D]; the softmax in fp32.

    visible_S: bool. softcap: scores become softcap * tanh(score / softcap). sinks_H: one more logit for each query
    head, which takes probability and gives no value.
    """
    batch, heads, _, dim = q_BH1D.shape
    groups = k_BKSD.shape[1]
    q_BKsD = q_BH1D.reshape(batch, groups, heads // groups, dim)
    scores = (q_BKsD @ k_BKSD.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible_S, -torch.inf)
    if sinks_H is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sinks = sinks_H.float().reshape(1, groups, heads // groups, 1).expand(batch, -1, -1, -1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return (weights.to(v_BKSD.dtype) @ v_BKSD).reshape(batch, heads, 1, v_BKSD.shape[-1])


def register() -> None:
    """Make the kernel known to transformers; doing it again changes nothing.

    It has no mask function: `kernels.stepping` gives the mask [1, 1, 1, S] itself.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if query.shape[2] != 1 or attention_mask is None or kwargs.get("position_bias") is not None:
        raise UserError(
            f"{type(module).__name__} asks for more than one token over a masked cache",
            where=NAME,
            fix="use another kernel; this one computes one token at a time",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = attention_mask[0, 0, 0, : key.shape[2]]  # a layer with a window has fewer slots, all of them in use
    return attention(query, key, value, visible, scale, softcap, s_aux).transpose(1, 2), None
