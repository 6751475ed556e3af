"""What windows in some layers do to the loss, measured: every variant in one pass over the layers.

A variant is a set of layers that have windows, all others see everything. Two variants with the same windows so far
share their stream: windowing each of L layers alone costs half of L passes, and the weights of a layer are read once.
Streams lie on disk; memory is one layer and a batch.

Legend: V variants, N rows, R tokens of a row, P positions, B rows of a batch, H query heads.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from retrofit.kv_heads.calibrate.layerwise_pass import Readout
from retrofit.kv_heads.calibrate.stream import LayerStream
from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.model.folder import ModelFolder
from retrofit.model.load import product_dtype
from retrofit.system.dealing import collected, own_share
from retrofit.system.device import calibration_tokens
from retrofit.system.world import ALONE, World
from retrofit.windows.heads import as_it_is, windowed

if TYPE_CHECKING:
    from retrofit.console import Progress


class Rows(Protocol):
    """What is measured. ids [N, R]; positions [P], in every row, whose next token's loss is wanted; window: tokens that
    a windowed layer sees."""

    @property
    def input_ids_NR(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def window(self) -> int: ...


Variant = frozenset[int]
"""Layers that have windows."""
TOKENS_PER_BATCH = 4096
STREAM_BYTES = 8 << 30
"""Of the streams of all variants that are measured together."""


def ablated_losses(
    model: ModelFolder,
    rows: Rows,
    variants: Sequence[Variant],
    sinks: Mapping[int, Tensor],
    *,
    device: str = "cpu",
    work: Path | None = None,
    world: World = ALONE,
    task: str = "measure windows",
    progress: Progress | None = None,
) -> Tensor:
    """Losses at the rows' `positions` under every variant, [V, N, P], float32.

    sinks: of windowed layers, [H] each, -inf for none. work: a folder for the streams, which are removed again. world:
    the processes that make this call; batches of rows are dealt out to them, and all return all losses.
    """
    nbytes = 8 * rows.input_ids_NR.numel() * model.spec.hidden_size
    together = max(1, STREAM_BYTES // nbytes)
    parts = [variants[i : i + together] for i in range(0, len(variants), together)]
    if progress:
        progress.start(task, len(parts) * len(model.spec.layers), "layers")
    found = []
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="variants-", dir=work) as folder:
            own = _Pass(model, rows, part, sinks, device, Path(folder), world, progress)
            found.append(own.losses())
    if progress:
        progress.finish()
    return torch.cat(found)


class _Pass:
    """The streams of some variants through all layers; of several processes each has those of its own batches."""

    def __init__(
        self,
        model: ModelFolder,
        rows: Rows,
        variants: Sequence[Variant],
        sinks: Mapping[int, Tensor],
        device: str,
        folder: Path,
        world: World,
        progress: Progress | None,
    ) -> None:
        self._model, self._rows, self._variants, self._sinks = model, rows, tuple(variants), sinks
        self._device, self._world, self._progress = device, world, progress
        length = rows.input_ids_NR.shape[1]
        together = max(1, calibration_tokens(device, model.spec, TOKENS_PER_BATCH) // length)
        batches = dict(enumerate(rows.input_ids_NR.split(together)))
        self._own = own_share({i: ids.numel() for i, ids in batches.items()}, world)
        self._batches = [batches[i] for i in self._own]
        shapes = [(*ids.shape, model.spec.hidden_size) for ids in self._batches] * len(set(variants))
        self._files = tuple(DiskTensors(folder / f"streams-{parity}", shapes) for parity in (0, 1))
        for file in self._files:
            file.create()

    def losses(self) -> Tensor:
        model, spec = self._model, self._model.spec
        config, read = copy.deepcopy(model.config), model.checkpoint.tensor
        autocast = product_dtype(self._device)
        stream = LayerStream(config, spec, read, device=self._device, autocast=autocast, captures=True)
        kwargs: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for i, ids in enumerate(self._batches):
            hidden, kwargs[tuple(ids.shape)] = stream.embed(ids)
            self._files[0].write(self._place(0, i), hidden)
        stream.free_embeddings()
        slots: dict[Variant, int] = {frozenset(): 0}
        for layer in spec.layers:
            index = layer.index
            with stream.layer(index) as run:
                after = dict.fromkeys(frozenset(own for own in v if own <= index) for v in self._variants)
                following = {variant: slot for slot, variant in enumerate(after)}
                for i, ids in enumerate(self._batches):
                    named = kwargs[tuple(ids.shape)][index]
                    for before, slot in slots.items():
                        wanted = [v for v in following if v - {index} == before]
                        hidden = self._files[index % 2].read(self._place(slot, i), self._device)
                        inputs = run.attention_inputs(hidden, named)
                        for variant in wanted:
                            new = index in variant
                            sinks_H = self._sinks.get(index)
                            heads = windowed(inputs, self._rows.window, sinks_H) if new else as_it_is(inputs)
                            out, _ = run.forward(hidden, named, heads_BTN=heads)
                            self._files[(index + 1) % 2].write(self._place(following[variant], i), out)
                slots = following
            if self._progress:
                self._progress.advance(1)
        del stream
        readout = Readout(model.config, spec, read, device=self._device)
        last, found, at_P = self._files[len(spec.layers) % 2], {}, self._rows.positions
        for variant, slot in slots.items():
            streams = (last.read(self._place(slot, i), self._device)[:, at_P] for i in range(len(self._batches)))
            losses = [readout.token_losses(x, ids[:, at_P + 1]) for x, ids in zip(streams, self._batches, strict=True)]
            every = collected(dict(zip(self._own, losses, strict=True)), self._world)
            found[variant] = torch.cat([every[i] for i in sorted(every)])
        return torch.stack([found[variant] for variant in self._variants])

    def _place(self, slot: int, batch: int) -> int:
        return slot * len(self._batches) + batch
