"""What fewer KV heads would cost, before anything is converted: arithmetic on moments, and a curve through measured
points.

A layer's cost at G KV heads is what the merge gives up of its attention output, as a share of the residual stream that
the output is part of:

    cost_l = (lost_keys + lost_values) A / (median(mean(h^2)) + A),   A = E||attn_l||^2 / C

with the shares that the merge loses under the best grouping, A the energy of the attention output under the values'
moments, and h the stream that enters the layer: its median token, so that a few with massive activations do not own
it. (Without A below, a first layer that adds to small embeddings would seem to be all there is.) To first order the
loss grows with the squared error that is injected, so the predicted increase is exp(a) (sum_l cost_l)^b, where b is 1
with one measured point and fitted with two.

Legend: K KV heads, D head dim, C model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retrofit.errors import UserError
from retrofit.format import heads
from retrofit.kv_heads.calibrate.moments import LayerMoments
from retrofit.kv_heads.merge.folding import RotationAverage
from retrofit.kv_heads.merge.grouping import best_groups
from retrofit.kv_heads.merge.joint import Groups, group_cost, merge_keys, output_metric, value_gram
from retrofit.kv_heads.merge.optimum import weighted
from retrofit.kv_heads.merge.qk_norm import can_fit
from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.model.spec import LayerAttention


@dataclass(frozen=True)
class LayerCost:
    """One layer at one number of KV heads. keys (None where they are mean-pooled), values: the shares of the scores'
    and of the attention output's energy that the merge gives up. cost: as in the module's formula."""

    index: int
    groups: Groups
    keys: float | None
    values: float
    cost: float


@dataclass(frozen=True)
class Measured:
    """The loss of a probe at `kv_heads` beyond the original's, in nats per token, and its standard error over
    sequences. also: the same of a further loss, where one was asked for."""

    kv_heads: int
    increase: float
    error: float
    also: float | None = None


@dataclass(frozen=True)
class Curve:
    """increase = exp(log_scale) cost^exponent. points: the measured numbers of KV heads it goes through. note: why it
    is not the curve that was asked for, None where it is."""

    log_scale: float
    exponent: float
    points: tuple[int, ...]
    note: str | None = None

    def __call__(self, cost: float) -> float:
        """Predicted increase of the loss in nats per token; nothing lost costs nothing."""
        return 0.0 if cost <= 0 else math.exp(self.log_scale) * cost**self.exponent


def layer_costs(
    moments: LayerMoments,
    weights: LayerWeights,
    layer: LayerAttention,
    counts: Sequence[int],
    turning: RotationAverage | None = None,
) -> dict[int, LayerCost]:
    """The cost of one layer at each number of KV heads in `counts`: of the groups that the conversion would choose,
    keys merged as it does. turning: the layer's rotations, where its rotary pairs may share places.

    Raises UserError for moments that were kept without the residual stream's energy.
    """
    if not moments.stream_quantiles:
        raise UserError(
            "these moments were kept without the residual stream's energy",
            where=f"layer {layer.index}",
            fix="leave out --moments, or name another folder",
        )
    calibrated_keys = layer.qk_norm is None or can_fit(layer)
    both = group_cost(moments, weights, layer.rope, keys=calibrated_keys)
    values_alone = group_cost(moments, weights, layer.rope, keys=False)
    everyone = tuple(range(layer.kv_heads))
    gram, _ = value_gram(moments, everyone, centred=weights.o_bias_C is not None)
    energy = float(weighted(gram, output_metric(weights)).trace()) / weights.o_CHD.shape[0]
    share = energy / max(moments.stream_quantiles[0] + energy, 1e-30)
    found = {}
    for count in counts:
        groups = best_groups(layer.kv_heads, count, both)
        values = sum(map(values_alone, groups))
        keys = _keys_lost(moments, groups, layer, turning) if calibrated_keys else None
        found[count] = LayerCost(layer.index, groups, keys, values, (values + (keys or 0.0)) * share)
    return found


def _keys_lost(moments: LayerMoments, groups: Groups, layer: LayerAttention, turning: RotationAverage | None) -> float:
    """Share of the scores' energy; a group of one loses nothing."""
    if all(len(group) == 1 for group in groups):
        return 0.0
    merged = [merge_keys(moments, group, layer.rope, layer.head_dim, turning=turning) for group in groups]
    return max(0.0, sum(lost for *_, lost, _ in merged)) / max(sum(whole for *_, whole in merged), 1e-300)


def fit_curve(costs: Mapping[int, float], measured: Sequence[Measured]) -> Curve | None:
    """The curve through one or two measured points; None where none of them lost anything that was measurable."""
    usable = sorted((m for m in measured if m.increase > 0 and costs[m.kv_heads] > 0), key=lambda m: m.kv_heads)
    if not usable:
        return None
    notes = [f"{heads(m.kv_heads)} lost nothing that was measurable" for m in measured if m not in usable]
    costliest = usable[0]
    x, y = math.log(costs[costliest.kv_heads]), math.log(costliest.increase)
    exponent = 1.0
    points: tuple[int, ...] = (costliest.kv_heads,)
    if len(usable) > 1:
        other = usable[1]
        run = x - math.log(costs[other.kv_heads])
        rise = y - math.log(other.increase)
        if run > 0 and rise > 0:
            exponent, points = rise / run, (costliest.kv_heads, other.kv_heads)
        else:
            notes.append(f"{heads(other.kv_heads)} lost no less than {costliest.kv_heads}")
    return Curve(y - exponent * x, exponent, points, "; ".join(notes) or None)


def probe_counts(counts: Sequence[int]) -> tuple[int, ...]:
    """Which numbers of KV heads are measured: the smallest, and one in the middle where there is one.

    counts: the possible ones below the model's own.
    """
    ordered = sorted(counts)
    return tuple(dict.fromkeys((ordered[0], ordered[len(ordered) // 2])))
