"""Blockwise attention: exact, with native grouped-query attention, in memory linear in the tokens.

Legend: B batch, H query heads, K KV heads (H = s K), T queries, S keys, D head dim. The T queries are the last T of the
S positions, so query i stands at position S - T + i.

Attention is cut into tiles (a run of queries against a run of keys, `tiles.py`) that a flash kernel can do without any
mask. Each tile gives (out, lse); tiles over the same queries are merged by their log-sum-exp (Milakov & Gimelshein
2018; Dao et al. 2022, FlashAttention, section 3.1). For the backward pass every tile is run with the merged out and
lse, which is exact: P = exp(S - lse) and dS = P * (dP - rowsum(dO * O)) both need the whole row only through these two.
Attention sinks (`sinks.py`) change these two and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels import attention_interface, gemm_tile, tile_choice
from retrofit.kernels.sinks import sink_gradient, with_sinks
from retrofit.kernels.tile_choice import TileChoice
from retrofit.kernels.tiles import Tile, tiles

NAME = "blockwise"
_RUN = 256  # longest causal tile where full tiles are cheaper than causal ones

_aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------- the primitive


def block(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v of one tile -> (out [B, H, T, D], lse [B, H, T], natural logarithm, at least fp32).

    causal: query i sees keys j <= i; needs T = S. Not differentiable by itself; `attention` is. On CUDA by the back end
    that `tile_choice` takes for these tensors.

    Raises: UserError on a device without a kernel that gives the log-sum-exp of this dtype and head dim.
    """
    assert not causal or q_BHTD.shape[2] == k_BKSD.shape[2], "a causal tile has as many keys as queries"
    if q_BHTD.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BKSD, v_BKSD, 0.0, causal, scale=scale)
        return out, lse
    backend = _choice(q_BHTD, k_BKSD).for_tile(q_BHTD.shape[2], k_BKSD.shape[2])
    return backend.forward(q_BHTD, k_BKSD, v_BKSD, causal, scale)


def block_backward(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) that one tile adds, given the out and lse of the whole row."""
    given = (grad_BHTD, q_BHTD, k_BKSD, v_BKSD, out_BHTD, lse_BHT)
    if q_BHTD.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=scale)
    backend = _choice(q_BHTD, k_BKSD).for_tile(q_BHTD.shape[2], k_BKSD.shape[2])
    return backend.backward(*given, causal, scale)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of both tiles. out [..., T, D] fp32 or fp64, lse [..., T]."""
    total = torch.logaddexp(lse, other_lse)
    own, other = torch.exp(lse - total)[..., None], torch.exp(other_lse - total)[..., None]
    return out * own + other_out.to(out.dtype) * other, total


def split_keys(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, parts: int) -> tuple[Tensor, Tensor]:
    """A full tile as `parts` tiles in the batch, each with a part of the keys -> (out fp32, lse).

    Few queries against many keys leave most of a GPU idle otherwise.
    """
    B, H, T, D = q_BHTD.shape
    size = k_BKSD.shape[2] // parts
    q = q_BHTD[:, None].expand(B, parts, H, T, D).flatten(0, 1)
    k, v = (_stacked(x, 0, size, parts, size) for x in (k_BKSD, v_BKSD))
    out, lse = (x.unflatten(0, (B, parts)) for x in block(q, k, v, False, scale))
    total = lse.logsumexp(1)
    whole = (out.float() * torch.exp(lse - total[:, None])[..., None]).sum(1)
    rest = k_BKSD.shape[2] - size * parts
    if rest:
        k, v = k_BKSD[:, :, -rest:], v_BKSD[:, :, -rest:]
        whole, total = merge(whole, total, *block(q_BHTD, k, v, False, scale))
    return whole, total


def runs_along(x: Tensor, start: int, size: int, count: int, step: int) -> Tensor:
    """View [B, heads, count, size, ...] of `count` runs along the tokens (dim 2), `step` apart."""
    if count == 1:
        return x[:, :, None, start : start + size]
    return x[:, :, start : start + (count - 1) * step + size].unfold(2, size, step).movedim(-1, 3)


def _stacked(x: Tensor, start: int, size: int, count: int, step: int) -> Tensor:
    """The runs of `runs_along` one after the other in the batch, [B count, heads, size, ...]."""
    return runs_along(x, start, size, count, step).movedim(2, 1).flatten(0, 1)


def _choice(q: Tensor, k: Tensor) -> TileChoice:
    if q.device.type != "cuda":
        raise UserError(f"no attention kernel with a log-sum-exp on {q.device.type}", fix="use kernel: sdpa")
    return tile_choice.choice_for(q, k)


# ---------------------------------------------------------------------------------------------- attention


def attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions -> out [B, H, T, D]; differentiable in q, k, v and sinks.

    window: tokens a query sees, itself included. sinks_H: one more logit for each query head, without a value. Memory
    beyond the result: O(T D), never T x S.

    Raises: UserError for head dims of q, k and v that differ, or query heads that are no multiple of the KV heads.
    """
    if not q_BHTD.shape[-1] == k_BKSD.shape[-1] == v_BKSD.shape[-1] or q_BHTD.shape[1] % k_BKSD.shape[1]:
        raise UserError(
            f"blockwise attention cannot express q {tuple(q_BHTD.shape)}, k {tuple(k_BKSD.shape)}, "
            f"v {tuple(v_BKSD.shape)}: one head dim, query heads a multiple of KV heads",
            fix="use kernel: sdpa",
        )
    given = (q_BHTD, k_BKSD, v_BKSD, sinks_H)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return _Attention.apply(q_BHTD, k_BKSD, v_BKSD, scale, window, sinks_H)
    queries, keys = q_BHTD.shape[2], k_BKSD.shape[2]
    plan = tiles(queries, keys, window, _RUN if gemm_tile.usable(q_BHTD) else None, side_by_side=many_at_once(q_BHTD))
    return _forward(q_BHTD, k_BKSD, v_BKSD, plan, scale, sinks_H, fast=True)[0]


def with_lse(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same without sinks or gradients, and the log-sum-exp of each row's scores: (out [B, H, T, D], lse [B, H, T],
    float32 at least)."""
    plan = tiles(q_BHTD.shape[2], k_BKSD.shape[2], window, side_by_side=many_at_once(q_BHTD))
    with torch.no_grad():
        return _forward(q_BHTD, k_BKSD, v_BKSD, plan, scale, None)


def many_at_once(q: Tensor) -> bool:
    """Whether the device computes many small tiles faster at once than one after the other."""
    return q.device.type != "cpu"


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        plan = tiles(q.shape[2], k.shape[2], window, side_by_side=many_at_once(q))
        out, lse = _forward(q, k, v, plan, scale, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, sinks = ctx.saved_tensors
        plan: list[Tile] = ctx.plan
        dsinks = None if sinks is None else sink_gradient(grad, out, lse, sinks)
        if len(plan) == 1 and plan[0].count == 1 and plan[0].k0 == 0:
            return *tile_backward(plan[0], grad, q, k, v, out, lse, ctx.scale), None, None, dsinks
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        for tile in plan:
            adds = tile_backward(tile, grad, q, k, v, out, lse, ctx.scale)
            for total, add, (start, stop) in zip(
                (dq, dk, dv), adds, ((tile.q0, tile.q1), (tile.k0, tile.k1), (tile.k0, tile.k1)), strict=True
            ):
                runs = runs_along(total, start, stop - start, tile.count, tile.step)
                runs += add.unflatten(0, (-1, tile.count)).movedim(1, 2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, dsinks


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[Tile], scale: float, sinks: Tensor | None, *, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D] in the dtype of q, lse [B, H, T]) over tiles and sinks. fast: `gemm_tile` may be used."""
    if len(plan) == 1 and plan[0].count == 1:
        return with_sinks(*tile_forward(plan[0], q, k, v, scale), sinks)
    out, lse = torch.empty_like(q), None
    start = 0
    while start < q.shape[2]:
        # Tiles of one group share their first query; an edge tile ends one query earlier than its group.
        group = [tile for tile in plan if tile.q0 == start]
        size, count, step = max(tile.q1 for tile in group) - start, group[0].count, group[0].step
        first, *rest = sorted(group, key=lambda tile: ("causal", "full", "edge").index(tile.kind))
        part, part_lse = tile_forward(first, q, k, v, scale)
        for tile in rest:
            if part.dtype.itemsize < 4:
                part = part.float()
            n = tile.q1 - tile.q0
            add, add_lse = tile_forward(tile, q, k, v, scale, shift=part_lse if fast else None)
            if n == part.shape[2]:
                part, part_lse = merge(part, part_lse, add, add_lse)
            else:
                part, part_lse = part.clone(), part_lse.clone()
                part[:, :, :n], part_lse[:, :, :n] = merge(part[:, :, :n], part_lse[:, :, :n], add, add_lse)
        part, part_lse = with_sinks(part, part_lse, sinks)
        if lse is None:
            lse = torch.empty(q.shape[:3], dtype=part_lse.dtype, device=q.device)
        for whole, runs in ((out, part), (lse, part_lse)):
            runs_along(whole, start, size, count, step).copy_(runs.unflatten(0, (-1, count)).movedim(1, 2))
        start += size + (count - 1) * step
    assert lse is not None
    return out, lse


def tile_forward(
    tile: Tile, q: Tensor, k: Tensor, v: Tensor, scale: float, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile; with `shift`, the log-sum-exp of its queries so far, a full tile may use `gemm_tile`."""
    q = _stacked(q, tile.q0, tile.q1 - tile.q0, tile.count, tile.step)
    k, v = (_stacked(x, tile.k0, tile.k1 - tile.k0, tile.count, tile.step) for x in (k, v))
    if shift is not None and tile.kind == "full" and gemm_tile.usable(q):
        result = gemm_tile.full_tile(q, k, v, scale, shift)
        if result is not None:
            return result
    if tile.kind == "full" and q.device.type == "cuda":
        parts = _choice(q, k).parts(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if parts > 1:
            return split_keys(q, k, v, scale, parts)
    if tile.kind != "edge":
        return block(q, k, v, tile.kind == "causal", scale)
    out, lse = block(q.flip(2), k.flip(2), v.flip(2), True, scale)
    return out.flip(2), lse.flip(2)


def tile_backward(
    tile: Tile, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of one tile; of several side by side, one after the other in the batch."""
    rows = [_stacked(x, tile.q0, tile.q1 - tile.q0, tile.count, tile.step) for x in (grad, q, out, lse)]
    columns = [_stacked(x, tile.k0, tile.k1 - tile.k0, tile.count, tile.step) for x in (k, v)]
    if tile.kind == "edge":
        rows, columns = [x.flip(2) for x in rows], [x.flip(2) for x in columns]
    grad, q, out, lse = (x.contiguous() for x in rows)
    k, v = (x.contiguous() for x in columns)
    grads = block_backward(grad, q, k, v, out, lse, tile.kind != "full", scale)
    return tuple(x.flip(2) for x in grads) if tile.kind == "edge" else grads


def register() -> None:
    """Make `blockwise` known to transformers."""
    attention_interface.register(NAME, attention)
