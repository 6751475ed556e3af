"""The price list of a model as arithmetic: what every number of KV heads costs, and the curve from cost to loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.kv_heads.calibrate import moments as stored_moments
from retrofit.kv_heads.merge.folding import RotationAverages
from retrofit.kv_heads.merge.weights import read_layer
from retrofit.kv_heads.sweep import pilot
from retrofit.kv_heads.sweep.costs import Curve, LayerCost, fit_curve, layer_costs
from retrofit.model.folder import ModelFolder
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.kv_budget import Budget

if TYPE_CHECKING:
    from retrofit.console import Progress


@dataclass(frozen=True)
class Price:
    """One number of KV heads.

    kv_cache_bytes: for one sequence of `PriceList.length` tokens. increase: of the loss, nats per token, against the
    original; ratio: of the perplexities (None where nothing was measured). how: "original", "measured" or "predicted".
    error: standard error of the increase, of a predicted one that of the nearest measured. layers: what each one pays.
    """

    kv_heads: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    cost: float
    increase: float | None
    ratio: float | None
    how: str
    error: float | None
    layers: tuple[LayerCost, ...]

    @property
    def significant(self) -> bool:
        """Whether the increase can be told from zero on the text that was scored."""
        return self.increase is None or self.error is None or not abs(self.increase) < 2 * self.error

    def worst_layers(self, count: int = 3) -> list[tuple[int, float]]:
        """(layer, share of the whole cost) of the layers that pay most."""
        if self.cost <= 0:
            return []
        ordered = sorted(self.layers, key=lambda layer: -layer.cost)
        return [(layer.index, layer.cost / self.cost) for layer in ordered[:count]]


@dataclass(frozen=True)
class PriceList:
    """Prices from the most KV heads to the fewest. length: tokens of the cache that is shown. curve: from cost to
    loss. kv_heads: what fits the budget, and command: what makes it (None without a budget)."""

    model: str
    length: int
    prices: tuple[Price, ...]
    calibrated: pilot.Calibrated | None
    curve: Curve | None
    budget: Budget | None
    kv_heads: int | None
    command: str | None
    notes: tuple[str, ...]


def price_list(
    spec: AttentionSpec,
    layers: list[Mapping[int, LayerCost]],
    calibrated: pilot.Calibrated | None,
    caches: Mapping[int, int],
    value_bytes: int,
) -> tuple[tuple[Price, ...], Curve | None]:
    """Arithmetic alone: the rows of the list, the most KV heads first, and the curve they lie on."""
    costs = {count: sum(layer[count].cost for layer in layers) for count in caches}
    curve = fit_curve(costs, calibrated.probes) if calibrated else None
    measured = {probe.kv_heads: probe for probe in calibrated.probes} if calibrated else {}
    rows = []
    for count in sorted(caches, reverse=True):
        how = "original" if count == spec.layers[0].kv_heads else "measured" if count in measured else "predicted"
        increase = measured[count].increase if how == "measured" else 0.0 if how == "original" else None
        if how == "predicted" and curve:
            increase = curve(costs[count])
        error = None
        if measured and increase is not None and how != "original":
            error = measured[min(measured, key=lambda other: abs(math.log(other / count)))].error
        rows.append(
            Price(
                kv_heads=count,
                kv_bytes_per_token=spec.with_kv_heads(count).kv_bytes_per_token(value_bytes),
                kv_cache_bytes=caches[count],
                cost=costs[count],
                increase=increase,
                ratio=None if increase is None else math.exp(min(increase, 50.0)),
                how=how if increase is not None else "not measured",
                error=error,
                layers=tuple(layer[count] for layer in layers),
            )
        )
    return tuple(rows), curve


def layerwise_costs(
    model: ModelFolder,
    spec: AttentionSpec,
    averages: RotationAverages,
    counts: tuple[int, ...],
    moments: Path,
    progress: Progress | None,
) -> list[Mapping[int, LayerCost]]:
    """Every layer's cost at every number of KV heads, from its moments and its weights: no pass over text."""
    read = model.checkpoint.tensor
    if progress:
        progress.start("price every number of KV heads", len(spec.layers), "layers")
    found: list[Mapping[int, LayerCost]] = []
    for layer in spec.layers:
        seen, weights = stored_moments.load(moments, layer.index), read_layer(read, layer)
        assert seen.value_mean_KD.shape == weights.v_KDC.shape[:2]  # of these weights: `MomentsSource`
        found.append(layer_costs(seen, weights, layer, counts, averages.of(layer.index)))
        if progress:
            progress.advance(1)
    if progress:
        progress.finish()
    return found
