"""What the repairs of a layer read: streams, targets and head outputs of the calibration, a batch at a time, from disk.

Legend: B sequences of a batch, R some of them, T tokens, C model width, N columns of the output projection (H D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from retrofit.kv_heads.calibrate.stream import LayerRun
from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.kv_heads.merge.weights import LayerWeights, write_layer
from retrofit.model.spec import LayerAttention
from retrofit.system.world import ALONE, World

Fold = tuple[str, int]  # kind of text, part of it


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
    are put. own: numbers of the batches that this process holds, all by default; the others of `world` hold the rest.
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
        own: Sequence[int] | None = None,
        world: World = ALONE,
    ) -> None:
        self.own, self.world = tuple(range(len(folds)) if own is None else own), world
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
            for i in self.own:
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
