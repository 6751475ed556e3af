"""What is done to a merged layer so that it gives what the original gave: a chain of repairs, each kept or left out.

A repair is given the layer's present weights and whatever it asks for of the calibration, a batch at a time, and
returns new weights and what came of them. It fits on some folds (kind of text, part of it) and judges itself on the
others; weights that it does not accept are dropped.

Legend: T tokens, C model width, N columns of the output projection (H D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.kv_heads.repair.outcome import RepairOutcome
from retrofit.kv_heads.repair.refit import RidgeSums, refit
from retrofit.kv_heads.repair.repair_inputs import Fold, RepairInputs
from retrofit.kv_heads.repair.transfer import LayerTransfer
from retrofit.system.device import algebra_device


class Repair(Protocol):
    """name: as in the recipe and in outcomes. Of several processes each calls it, with the batches that it holds, and
    all return the same."""

    @property
    def name(self) -> str: ...

    def columns(self, heads: int, head_dim: int, bias: bool) -> int:
        """Columns of each of its least-squares fits, 0 where it has none."""
        ...

    def __call__(self, inputs: RepairInputs, weights: LayerWeights) -> tuple[LayerWeights, RepairOutcome]: ...


def repair_layer(
    repairs: Sequence[Repair], inputs: RepairInputs, weights: LayerWeights
) -> tuple[LayerWeights, tuple[RepairOutcome, ...]]:
    """All repairs in order, each on what the ones before it left. The layer of `inputs` ends with the weights that
    are returned."""
    outcomes = []
    for repair in repairs:
        repaired, outcome = repair(inputs, weights)
        weights = repaired if outcome.accepted else weights
        inputs.use(weights)
        outcomes.append(outcome)
    return weights, tuple(outcomes)


@dataclass(frozen=True)
class OutputRidge:
    """The output projection refitted on the converted stream (see `refit`)."""

    name: str = "o_proj"

    def columns(self, heads: int, head_dim: int, bias: bool) -> int:
        return heads * head_dim + bias

    def __call__(self, inputs: RepairInputs, weights: LayerWeights) -> tuple[LayerWeights, RepairOutcome]:
        bias = weights.o_bias_C
        width, heads, head_dim = weights.o_CHD.shape
        columns = self.columns(heads, head_dim, bias is not None)
        sums: dict[Fold, RidgeSums] = {fold: RidgeSums.nothing(columns, width) for fold in inputs.folds}
        for i in inputs.own:
            z_TN = inputs.heads(i).flatten(0, 1)
            if bias is not None:
                z_TN = torch.cat([z_TN, torch.ones_like(z_TN[:, :1])], 1)
            part = RidgeSums.of(z_TN, inputs.target(i).flatten(0, 1), inputs.weight(i).flatten())
            sums[inputs.folds[i]] += part
        start = weights.o_CHD.flatten(1, 2)
        if bias is not None:
            start = torch.cat([start, bias[:, None]], 1)
        sums = {fold: part.together(inputs.world) for fold, part in sums.items()}
        device = algebra_device(inputs.device, columns)
        ridge = inputs.world.only(lambda: refit(sums, start.double(), device))
        outcome = RepairOutcome(self.name, ridge.accepted, ridge.held_out_before, ridge.held_out_after)
        return with_output(weights, ridge.w_CN), outcome


def with_output(weights: LayerWeights, w_CN: Tensor) -> LayerWeights:
    """Weights with another output projection [C, N]; a last column beyond the heads is the bias."""
    heads, head_dim = weights.o_CHD.shape[1:]
    n = heads * head_dim
    bias = weights.o_bias_C if weights.o_bias_C is None else w_CN[:, n].float()
    return replace(weights, o_CHD=w_CN[:, :n].reshape(-1, heads, head_dim).float(), o_bias_C=bias)


# What a recipe's `repair` stands for.
REPAIRS: Mapping[str, tuple[Repair, ...]] = {
    "none": (),
    "o_proj": (OutputRidge(),),
    "transfer": (OutputRidge(), LayerTransfer()),
}
