"""Causal attention as plain matrix products: the fast way to train in bfloat16 on a CPU.

A processor with bfloat16 arithmetic multiplies matrices several times faster than PyTorch's CPU flash op works, and
that op gains nothing from bfloat16. Here the scores of a run of queries exist at a time, for all query heads of one KV
head together; the backward pass makes them again. Memory beyond the result is O(ROWS S), never T x S.

Scores are rounded to bfloat16, as in an eager bfloat16 model. `blockwise`, for measuring, loses less, though it is not
free of that rounding: in bfloat16 on a CPU its full tiles (`gemm_tile`) round too, but scores shifted to be near zero.

Legend: B batch, H query heads, K KV heads, G = H / K, T tokens, D head dim, R = G x queries of a run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrofit.kernels import attention_interface

NAME = "products"
ROWS = 512  # rows of scores that exist at a time, near the best on processors with 1 to 2 MiB of L2 cache


def attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over whole causal sequences -> [B, H, T, D]; differentiable in q, k, v and sinks.

    window: tokens a query sees, itself included. sinks_H: one more logit for each query head, without a value.
    """
    assert q_BHTD.shape[2] == k_BKTD.shape[2], "whole sequences only: as many queries as keys"
    out: Tensor = _Attention.apply(q_BHTD, k_BKTD, v_BKTD, scale, window, sinks_H)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        k, v = k.contiguous(), v.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for b, head, heads, rows, keys, hidden in _runs(q, k, window):
            p_RS, _ = _probabilities(q[b, heads, rows], k[b, head, keys], scale, hidden, _of_heads(sinks, heads))
            out[b, heads, rows] = (p_RS @ v[b, head, keys]).view(-1, rows.stop - rows.start, q.shape[3])
        ctx.save_for_backward(q, k, v, out, sinks)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, sinks = ctx.saved_tensors
        # Rows of dS sum to zero, up to rounding; without the keys' mean that rounding stays small in dS k. With sinks
        # they sum to zero together with the sink's column, whose dS is -delta times what the sink takes.
        mean = k.mean(2, keepdim=True, dtype=torch.float32).to(k.dtype)
        centred = k - mean
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        dsinks = None if sinks is None else torch.zeros(sinks.shape, dtype=torch.float32, device=q.device)
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        for b, head, heads, rows, keys, hidden in _runs(q, k, ctx.window):
            given = q[b, heads, rows], k[b, head, keys], ctx.scale, hidden, _of_heads(sinks, heads)
            p_RS, taken_GT = _probabilities(*given)
            d_RD = grad[b, heads, rows].reshape(-1, grad.shape[3])
            dv[b, head, keys] += p_RS.T @ d_RD
            ds_RS = d_RD @ v[b, head, keys].T
            ds_RS.sub_(delta[b, heads, rows].reshape(-1, 1).to(q.dtype)).mul_(p_RS)
            dq[b, heads, rows] = (
                (ds_RS @ centred[b, head, keys]).mul_(ctx.scale).view(-1, rows.stop - rows.start, q.shape[3])
            )
            dk[b, head, keys] += ds_RS.T @ (q[b, heads, rows] * ctx.scale).reshape(-1, q.shape[3])
            if dsinks is not None and taken_GT is not None:
                rest_GT1 = delta[b, heads, rows] * taken_GT[..., None]
                dsinks[heads] -= rest_GT1.sum((1, 2))
                dq[b, heads, rows] += (rest_GT1 * mean[b, head] * ctx.scale).to(q.dtype)
        sinks_gradient = None if dsinks is None else dsinks.to(sinks.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, sinks_gradient


def _probabilities(
    q_GTD: Tensor, k_SD: Tensor, scale: float, hidden_TS: Tensor, sinks_G: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(softmax of one run [R, S], what the sinks take of each row [G, T], None without sinks).

    hidden_TS is added to the scores of the last columns.
    """
    s_RS = (q_GTD * scale).reshape(-1, q_GTD.shape[2]) @ k_SD.T
    s_RS.view(q_GTD.shape[0], q_GTD.shape[1], -1)[:, :, -hidden_TS.shape[1] :] += hidden_TS
    p_RS = torch.softmax(s_RS, -1)
    if sinks_G is None:
        return p_RS, None
    # A row's largest score and largest probability give its log-sum-exp without scores in fp32.
    wide = torch.promote_types(s_RS.dtype, torch.float32)
    lse_R = s_RS.amax(-1).to(wide) - p_RS.amax(-1).to(wide).log()
    taken_GT = torch.sigmoid(sinks_G.to(wide)[:, None] - lse_R.view(q_GTD.shape[:2]))
    p_RS.mul_((1 - taken_GT).view(-1, 1).to(p_RS.dtype))
    return p_RS, taken_GT


def _of_heads(sinks_H: Tensor | None, heads: slice) -> Tensor | None:
    return None if sinks_H is None else sinks_H[heads]


def _runs(q: Tensor, k: Tensor, window: int | None) -> list[tuple[int, int, slice, slice, slice, Tensor]]:
    """(batch, KV head, its query heads, queries, keys, -inf where a key is hidden) of every run."""
    (batch, heads, tokens, _), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    step = max(16, ROWS // group)
    spans = []
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        query = torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(start if window is None else first, stop, device=q.device)
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
        spans.append((slice(start, stop), slice(first, stop), bias))
    return [
        (b, head, slice(head * group, head * group + group), rows, keys, bias)
        for b in range(batch)
        for head in range(kv_heads)
        for rows, keys, bias in spans
    ]


def register() -> None:
    """Make `products` known to transformers. Queries and keys that RoPE left in another dtype take the values'."""

    def cast(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None) -> Tensor:
        return attention(q.to(v.dtype), k.to(v.dtype), v, scale, window, sinks)

    attention_interface.register(NAME, cast)
