"""Time and bytes of ring attention on N GPUs, from the rate of one and the bandwidth of the links between them.

A model of `ring` with zigzag placement: every step takes as long as its computation or its transfers, whichever is
longer, and all ranks are alike. Nothing here measures anything, and latencies are left out.

T tokens in all, n = T / N of a rank, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

GRADIENT_ITEM = 4
"""Bytes of an element of the travelling gradients, which are summed in float32."""

BACKWARD = 2.5
"""FLOP of the backward pass per FLOP forward: five matrix products a tile for two."""


@dataclass(frozen=True)
class AttentionShape:
    """Attention of one layer. item: bytes of an element of keys and values. window: tokens a query sees, or all."""

    heads: int
    kv_heads: int
    head_dim: int
    item: int = 2
    window: int | None = None


@dataclass(frozen=True)
class Link:
    """rate: FLOP/s of an attention tile on one GPU, forward. bandwidth: bytes/s that one GPU sends while it receives as
    many. backward_rate: FLOP/s of the backward pass; as forward where None."""

    rate: float
    bandwidth: float
    backward_rate: float | None = None


@dataclass(frozen=True)
class PassTime:
    """Seconds of one layer's attention forward or backward on N GPUs. compute: of its products alone. exposed: what
    transfers add to that. bytes_sent: by each rank."""

    compute: float
    exposed: float
    bytes_sent: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Of N GPUs that would not have to wait: 1 is ideal."""
        return self.compute / self.seconds


def forward_flops(tokens: int, shape: AttentionShape) -> float:
    """FLOP of causal attention forward over a whole sequence: 4 D H for each visible (query, key) pair."""
    window = min(shape.window or tokens, tokens)
    pairs = window * (window + 1) / 2 + (tokens - window) * window
    return 4 * shape.head_dim * shape.heads * pairs


def forward_time(tokens: int, ranks: int, shape: AttentionShape, link: Link) -> PassTime:
    """Attention of one layer forward."""
    compute = forward_flops(tokens, shape) / ranks / link.rate
    return _time(compute, ranks, [_step_bytes(tokens, ranks, shape)] * (ranks - 1), 0, link)


def backward_time(tokens: int, ranks: int, shape: AttentionShape, link: Link) -> PassTime:
    """Attention of one layer backward: keys and values travel again, and behind them their gradients.

    What was computed in a step is sent during the next one, so the last gradients go home with nothing to hide behind.
    """
    compute = BACKWARD * forward_flops(tokens, shape) / ranks / (link.backward_rate or link.rate)
    keys = _step_bytes(tokens, ranks, shape)
    gradients = keys * GRADIENT_ITEM / shape.item
    during = [keys * (step < ranks - 1) + gradients * (step > 1) for step in range(ranks)]
    return _time(compute, ranks, during, gradients if ranks > 1 else 0, link)


def hidden_from(shape: AttentionShape, link: Link) -> float:
    """Tokens a rank from which the forward pass hides its transfers: n = R K item / (H B); full attention.

    A step computes 2 H D n^2 FLOP and sends 2 n K D elements.
    """
    return link.rate * shape.kv_heads * shape.item / (shape.heads * link.bandwidth)


def hidden_from_backward(shape: AttentionShape, link: Link) -> float:
    """The same for the backward pass, whose steps compute 2.5 times as much and send gradients too."""
    rate = link.backward_rate or link.rate
    return rate * shape.kv_heads * (shape.item + GRADIENT_ITEM) / (BACKWARD * shape.heads * link.bandwidth)


def ulysses_copies(heads: int, kv_heads: int, ranks: int) -> int | None:
    """How often every KV head would exist on `ranks` ranks that split heads instead (DeepSpeed-Ulysses, ALST).

    1 up to as many ranks as KV heads; beyond, heads are copied, and what fewer KV heads save is lost again. None where
    the query heads cannot be split evenly, or no rank's query heads read whole KV heads.
    """
    if heads % ranks:
        return None
    return lcm(kv_heads, ranks) // kv_heads if kv_heads % ranks == 0 or ranks % kv_heads == 0 else None


def ulysses_bytes(tokens: int, ranks: int, shape: AttentionShape) -> float:
    """Bytes that each rank would send forward in a layer if heads were split: queries and outputs, and keys and values
    with their copies, all but the rank's own part.

    Raises: ValueError where the heads cannot be split.
    """
    copies = ulysses_copies(shape.heads, shape.kv_heads, ranks)
    if copies is None:
        raise ValueError(f"{shape.heads} query and {shape.kv_heads} KV heads cannot be split over {ranks} ranks")
    elements = (tokens / ranks) * 2 * (shape.heads + copies * shape.kv_heads) * shape.head_dim
    return elements * shape.item * (ranks - 1) / ranks


def _step_bytes(tokens: int, ranks: int, shape: AttentionShape) -> float:
    """Keys and values that a rank sends in a step. With a window only the keys that its chunks see before them do, two
    chunks of a rank in all steps together."""
    elements = 2 * (tokens / ranks) * shape.kv_heads * shape.head_dim
    if shape.window is not None and shape.window < tokens and ranks > 1:
        needed = min(2 * (shape.window - 1), (ranks - 1) * tokens / ranks)
        elements = 2 * needed / (ranks - 1) * shape.kv_heads * shape.head_dim
    return elements * shape.item


def _time(compute: float, ranks: int, during: list[float], after: float, link: Link) -> PassTime:
    """during: bytes that leave during each step; after: bytes that leave after the last."""
    step = compute / ranks
    late = sum(max(0.0, sent / link.bandwidth - step) for sent in during)
    return PassTime(compute, late + after / link.bandwidth, sum(during) + after)
