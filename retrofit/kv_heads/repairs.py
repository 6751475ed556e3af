"""What is done to a merged layer so that it gives what the original gave: a chain of repairs, each kept or left out.

A repair is given the layer's present weights and whatever it asks for of the calibration, a batch at a time, and
returns new weights and what came of them. It fits on some folds (kind of text, part of it) and judges itself on the
others; weights that it does not accept are dropped.

Legend: B sequences of a batch, T tokens, C model width, N columns of the output projection (H D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from retrofit.kv_heads.outcome import RepairOutcome
from retrofit.kv_heads.refit import RidgeSums, refit
from retrofit.kv_heads.residuals import DiskTensors
from retrofit.kv_heads.stream import LayerRun
from retrofit.kv_heads.transfer import LayerTransfer
from retrofit.kv_heads.weights import LayerWeights, write_layer
from retrofit.model.spec import LayerAttention

Fold = tuple[str, int]


class Repair(Protocol):
    """name: as in the recipe and in outcomes."""

    @property
    def name(self) -> str: ...

    def columns(self, heads: int, head_dim: int, bias: bool) -> int:
        """Columns of each of its least-squares fits, 0 where it has none."""
        ...

    def __call__(self, inputs: RepairInputs, weights: LayerWeights) -> tuple[LayerWeights, RepairOutcome]: ...


@dataclass(frozen=True)
class LayerFiles:
    """Files of one layer: the original and the converted stream that enter it, targets and head outputs."""

    original: DiskTensors
    converted: DiskTensors
    targets: DiskTensors
    heads: DiskTensors


class RepairInputs:
    """What repairs read of one layer, batch by batch; every call reads from disk and keeps nothing.

    layer: the converted one. run: it, in memory, with the present weights. folds: of each batch. device: where tensors
    are put.
    """

    def __init__(
        self,
        layer: LayerAttention,
        run: LayerRun,
        weights: LayerWeights,
        folds: Sequence[Fold],
        files: LayerFiles,
        kwargs: Callable[[int], dict[str, Any]],
        device: str,
    ) -> None:
        self.layer, self.run, self.folds, self.device = layer, run, tuple(folds), device
        self._weights, self._files, self._kwargs = weights, files, kwargs
        self._heads_known = False

    def hidden(self, batch: int) -> Tensor:
        """The converted stream that enters the layer, [B, T, C]."""
        return self._files.converted.read(batch, self.device)

    def kwargs(self, batch: int) -> dict[str, Any]:
        """Keyword arguments of the layer."""
        return self._kwargs(batch)

    def target(self, batch: int) -> Tensor:
        """What the output projection should give on the converted stream, [B, T, C]: what the original's gave on its
        own, and the error of the layers before where that can be undone here."""
        return self._files.targets.read(batch, self.device)

    def weight(self, batch: int) -> Tensor:
        """Weight of each token's squared error, [B, T]: 1 / mean(h^2) of the original stream."""
        return 1.0 / self._files.original.read(batch, self.device).square().mean(-1).clamp_min(1e-8)

    def heads(self, batch: int) -> Tensor:
        """What the output projection reads under the present weights, [B, T, N]; computed once for these weights."""
        if not self._heads_known:
            for i in range(len(self.folds)):
                self._files.heads.write(i, self.run.head_outputs(self.hidden(i), self.kwargs(i)))
            self._heads_known = True
        return self._files.heads.read(batch, self.device)

    def shape(self, batch: int) -> tuple[int, int]:
        """Sequences and tokens of a batch, (B, T)."""
        b, t, _ = self._files.converted.shape(batch)
        return b, t

    def attend(self, batch: int, rows: slice) -> Tensor:
        """The output projection's result for some sequences of a batch, with gradients to the attention's parameters
        that ask for them, [R, T, C]."""
        hidden_BTC = self.hidden(batch)
        size = hidden_BTC.shape[0]
        kwargs = {name: _rows(value, rows, size) for name, value in self.kwargs(batch).items()}
        return self.run.attend(hidden_BTC[rows], kwargs)

    def use(self, weights: LayerWeights) -> None:
        """Make `weights` the present ones."""
        only_output = all(
            getattr(weights, f.name) is getattr(self._weights, f.name)
            for f in fields(LayerWeights)
            if not f.name.startswith("o_")
        )
        self.run.load(write_layer(weights, self.layer))
        self._weights, self._heads_known = weights, self._heads_known and only_output


def _rows(value: Any, rows: slice, size: int) -> Any:
    """`rows` of every tensor that has one row for each of the batch's `size` sequences."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == size else value
    if isinstance(value, tuple):
        return tuple(_rows(part, rows, size) for part in value)
    return value


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
        sums: dict[Fold, RidgeSums] = {}
        for i, fold in enumerate(inputs.folds):
            z_TN = inputs.heads(i).flatten(0, 1)
            if bias is not None:
                z_TN = torch.cat([z_TN, torch.ones_like(z_TN[:, :1])], 1)
            part = RidgeSums.of(z_TN, inputs.target(i).flatten(0, 1), inputs.weight(i).flatten())
            sums[fold] = sums[fold] + part if fold in sums else part
        start = weights.o_CHD.flatten(1, 2)
        if bias is not None:
            start = torch.cat([start, bias[:, None]], 1)
        ridge = refit(sums, start.double())
        outcome = RepairOutcome(self.name, ridge.accepted, ridge.held_out_before, ridge.held_out_after)
        return _with_output(weights, ridge.w_CN), outcome


def _with_output(weights: LayerWeights, w_CN: Tensor) -> LayerWeights:
    """Weights with a refitted output projection; a last column beyond the heads is the bias."""
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
