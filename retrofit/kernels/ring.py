"""Ring attention: exact causal attention of one sequence whose tokens are shared out over the ranks of a group.

Every rank keeps its queries; keys and values travel (Liu, Zaharia and Abbeel 2023, "Ring Attention with Blockwise
Transformers", section 3). In step t rank r computes against the share of rank r - t while that of rank r - t - 1
arrives. Results of steps are merged by their log-sum-exp in fp32; each step is cut into the tiles that `blockwise` is
made of. In the backward pass keys and values travel again, and their gradients, summed in fp32, one step behind them.

A layer with a sliding window sends each rank the keys it sees and nothing else, straight from the rank that has them.
Attention sinks (`sinks.py`) come after the last step, and nothing of them travels: each rank adds its queries' part of
their gradient, as it does for every parameter.

Legend: B batch, H query heads, K KV heads (H = s K), n tokens of this rank, m tokens that arrive, D head dim, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels.blockwise import many_at_once, runs_along, tile_backward, tile_forward
from retrofit.kernels.placement import Runs, count, seen, tiles_between
from retrofit.kernels.ring_group import Ring
from retrofit.kernels.sinks import sink_gradient, with_sinks
from retrofit.kernels.tiles import Tile


def attention(
    q_BHnD: Tensor,
    k_BKnD: Tensor,
    v_BKnD: Tensor,
    scale: float,
    window: int | None,
    sinks_H: Tensor | None = None,
    *,
    ring: Ring,
) -> Tensor:
    """Causal attention of this rank's queries over the whole sequence -> out [B, H, n, D]; differentiable.

    Every rank of the group calls it with its own share, and their backward passes run in the same order. window: tokens
    a query sees, itself included. sinks_H: one more logit for each query head, without a value; the sum of the ranks'
    gradients is that of the sequence. Memory beyond the result: O(n D) in fp32 and two arriving shares of keys and
    values.

    Raises: UserError for tensors that are not this rank's share, or that the tiles cannot express.
    """
    tokens, n = ring.placement.tokens, count(ring.runs)
    if not q_BHnD.shape[2] == k_BKnD.shape[2] == v_BKnD.shape[2] == n:
        raise UserError(
            f"rank {ring.rank} holds {n} of {tokens} tokens and was given {q_BHnD.shape[2]} queries and "
            f"{k_BKnD.shape[2]} keys",
            fix="give each rank its own share of the sequence, and no KV cache",
        )
    if not q_BHnD.shape[-1] == k_BKnD.shape[-1] == v_BKnD.shape[-1] or q_BHnD.shape[1] % k_BKnD.shape[1]:
        raise UserError(
            f"ring attention cannot express q {tuple(q_BHnD.shape)}, k {tuple(k_BKnD.shape)}, "
            f"v {tuple(v_BKnD.shape)}: one head dim, query heads a multiple of KV heads",
            fix="do not share one sequence over several ranks with this model",
        )
    window = window if window is not None and window < tokens else None
    kv = torch.stack((k_BKnD, v_BKnD))  # one message, and contiguous
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q_BHnD, kv, sinks_H)):
        out: Tensor = _Attention.apply(q_BHnD, kv, scale, window, sinks_H, ring)
        return out
    return _forward(q_BHnD, kv, scale, window, sinks_H, ring, fast=True)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, scale: float, window: int | None, sinks: Tensor | None, ring: Ring
    ) -> Tensor:
        out, lse = _forward(q, kv, scale, window, sinks, ring)
        ctx.save_for_backward(q, kv, out, lse, sinks)
        ctx.scale, ctx.window, ctx.ring = scale, window, ring
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, kv, out, lse, sinks = ctx.saved_tensors
        dsinks = None if sinks is None else sink_gradient(grad, out, lse, sinks)
        dq, dkv = _backward(grad, q, kv, out, lse, ctx.scale, ctx.window, ctx.ring)
        return dq, dkv, None, None, dsinks, None


def _forward(
    q: Tensor,
    kv: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    ring: Ring,
    *,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, n, D] in the dtype of q, lse [B, H, n]) over the keys of all ranks and the sinks."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    for _, runs, (k, v) in _shares(kv, window, ring):
        for tile in tiles_between(ring.runs, runs, window, side_by_side=many_at_once(q)):
            part, total = (_queries(x, tile) for x in (out, lse))
            # Of a rank's own share the causal tiles come first, so that every query has a log-sum-exp after them.
            shift = lse[:, :, tile.q0 : tile.q1] if fast and tile.kind == "full" and tile.count == 1 else None
            add, add_lse = (_beside(x, tile) for x in tile_forward(tile, q, k, v, scale, shift=shift))
            part.lerp_(add.to(wide), torch.sigmoid(add_lse - total)[..., None])
            total.copy_(torch.logaddexp(total, add_lse))
    out, lse = with_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None, ring: Ring
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of this rank's keys and values [2, B, K, n, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, home = torch.zeros(q.shape, dtype=wide, device=q.device), torch.zeros(kv.shape, dtype=wide, device=kv.device)
    travelling = _Homeward(home, window, ring)
    for step, runs, (k, v) in _shares(kv, window, ring):
        dkv = (
            home if step == 0 else torch.zeros((*kv.shape[:3], count(runs), kv.shape[4]), dtype=wide, device=kv.device)
        )
        for tile in tiles_between(ring.runs, runs, window, side_by_side=many_at_once(q)):
            adds = tile_backward(tile, grad, q, k, v, out, lse, scale)
            for total, add in zip((_queries(dq, tile), *(_keys(x, tile) for x in dkv)), adds, strict=True):
                total += _beside(add, tile)
        if step:
            travelling.send(step, dkv)
    travelling.finish()
    return dq.to(q.dtype), home.to(kv.dtype)


def _queries(x: Tensor, tile: Tile) -> Tensor:
    """View [B, heads, count, size, ...] of the queries of a tile, or of several side by side."""
    return runs_along(x, tile.q0, tile.q1 - tile.q0, tile.count, tile.step)


def _keys(x: Tensor, tile: Tile) -> Tensor:
    return runs_along(x, tile.k0, tile.k1 - tile.k0, tile.count, tile.step)


def _beside(x: Tensor, tile: Tile) -> Tensor:
    """The same view of what a tile gave: tiles side by side are one after the other in the batch."""
    return x.unflatten(0, (-1, tile.count)).movedim(1, 2)


# ------------------------------------------------------------------------------------------------- what travels


def _shares(own: Tensor, window: int | None, ring: Ring) -> Iterator[tuple[int, Runs, Tensor]]:
    """(step t, runs, keys and values [2, B, K, m, D]) of this rank's own share, then of those of the ranks before it.

    The next share is under way while the caller works on the one it has.
    """
    ranks = ring.placement.ranks
    current = own
    for step in range(ranks):
        following = _next_share(step + 1, own, current, window, ring) if step + 1 < ranks else None
        yield step, _runs(step, window, ring), current
        if following is not None:
            current = following.arrived()


def _next_share(step: int, own: Tensor, current: Tensor, window: int | None, ring: Ring) -> _Transfer:
    """Begin the transfer of the share of step `step`."""
    arriving = own.new_empty((*own.shape[:3], count(_runs(step, window, ring)), own.shape[4]))
    if window is None:  # passed on from rank to rank
        return _Transfer(current, 1, arriving, ring)
    wanted = seen(ring.runs, ring.placement.shares[(ring.rank + step) % ring.placement.ranks], window)
    return _Transfer(_select(own, ring.runs, wanted), step, arriving, ring)


class _Transfer:
    """A tensor on its way to rank r + distance while another one arrives from rank r - distance.

    Nothing is sent where there is no token.
    """

    def __init__(self, leaving: Tensor, distance: int, arriving: Tensor, ring: Ring) -> None:
        ranks = ring.placement.ranks
        self._arriving = arriving
        self._operations = [  # they keep both tensors until they have arrived
            dist.P2POp(operation, tensor, group=ring.group, group_peer=peer % ranks)
            for operation, tensor, peer in (
                (dist.isend, leaving.contiguous(), ring.rank + distance),
                (dist.irecv, arriving, ring.rank - distance),
            )
            if tensor.numel()
        ]
        self._works = dist.batch_isend_irecv(self._operations) if self._operations else []

    def arrived(self) -> Tensor:
        """The tensor that arrives, once it has; the one that leaves may be written again."""
        for work in self._works:
            work.wait()
        self._works, self._operations = [], []
        return self._arriving


class _Homeward:
    """Gradients of other ranks' keys and values on their way home; what arrives for `home` is added to it.

    Without a window they follow the keys from rank to rank and gather every rank's part; with one they go straight
    back.
    """

    def __init__(self, home: Tensor, window: int | None, ring: Ring) -> None:
        self.home, self.window, self.ring = home, window, ring
        self._transfer: _Transfer | None = None
        self._slots = [slice(0, home.shape[3])]  # of `home`, where what arrives last belongs

    def send(self, step: int, dkv: Tensor) -> None:
        """dkv: this rank's part of the gradient of the share of step `step`."""
        ring, ranks = self.ring, self.ring.placement.ranks
        if self.window is None:
            if self._transfer is not None:
                dkv += self._transfer.arrived()
            # The rank before sends that of the share which comes here next; after the last step that is the own one.
            self._transfer = _Transfer(dkv, 1, self._empty(_runs((step + 1) % ranks, None, ring)), ring)
            return
        self.finish()
        wanted = seen(ring.runs, ring.placement.shares[(ring.rank + step) % ranks], self.window)
        self._slots = _slots(ring.runs, wanted)
        self._transfer = _Transfer(dkv, -step, self._empty(wanted), ring)

    def finish(self) -> None:
        """Wait for what is under way to `home` and add it."""
        if self._transfer is not None:
            sizes = [slot.stop - slot.start for slot in self._slots]
            for slot, part in zip(self._slots, self._transfer.arrived().split(sizes, 3), strict=True):
                self.home[:, :, :, slot] += part
            self._transfer = None

    def _empty(self, runs: Runs) -> Tensor:
        return self.home.new_empty((*self.home.shape[:3], count(runs), self.home.shape[4]))


def _runs(step: int, window: int | None, ring: Ring) -> Runs:
    """The runs that this rank computes against in a step: of its own share, or what it sees of rank r - step's."""
    runs = ring.placement.shares[(ring.rank - step) % ring.placement.ranks]
    return runs if window is None or step == 0 else seen(runs, ring.runs, window)


def _slots(runs: Runs, parts: Runs) -> list[slice]:
    """Where `parts`, runs inside `runs`, are in a tensor that holds `runs`."""
    slots, before = [], 0
    for start, stop in runs:
        slots += [slice(before + a - start, before + b - start) for a, b in parts if start <= a < stop]
        before += stop - start
    return slots


def _select(kv: Tensor, runs: Runs, parts: Runs) -> Tensor:
    slots = _slots(runs, parts)
    return torch.cat([kv[:, :, :, slot] for slot in slots], 3) if slots else kv[:, :, :, :0]
