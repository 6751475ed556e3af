"""Windows in chosen layers, layer by layer: sinks, the repair of the output projection, and both streams one layer on.

The stream of the original (X) and that of the layers converted so far (X~) lie on disk; in memory are one layer, its
sums and a batch. The sinks of a windowed layer are fitted on X~, and so is its output projection
(`kv_heads.repair.refit`), whose target gives back what the layers before have lost: Y* = attn(X) + (X - X~) (over the
factor between the projection and the stream; attn(X) alone where a norm stands there).

Legend: B sequences of a batch, T tokens, C model width, H query heads, D head dim, N = H D.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.checkpoint.cast import narrowed
from retrofit.data.calibration import TOKENS_PER_BATCH, CalibrationText
from retrofit.kernels.sinks import with_sinks
from retrofit.kv_heads.calibrate.layerwise_pass import Readout
from retrofit.kv_heads.calibrate.residuals import STREAMS, LayerFolder
from retrofit.kv_heads.calibrate.stream import LayerRun, LayerStream
from retrofit.kv_heads.disk import work_key
from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer, write_layer
from retrofit.kv_heads.repair.outcome import RepairOutcome
from retrofit.kv_heads.repair.refit import RidgeSums, refit
from retrofit.kv_heads.repair.repairs import with_output
from retrofit.model.folder import ModelFolder
from retrofit.model.load import product_dtype
from retrofit.model.spec import LayerAttention, TensorSlot
from retrofit.system.dealing import collected, own_share
from retrofit.system.device import algebra_device, calibration_tokens
from retrofit.system.world import ALONE, World
from retrofit.windows import VERSION
from retrofit.windows.heads import as_it_is, joined, under
from retrofit.windows.moments import WindowSums
from retrofit.windows.outcome import Rise, WindowLayerReport
from retrofit.windows.rows import Repeats
from retrofit.windows.sinks import fit_sinks, given_back
from retrofit.windows.survey import token_weights

if TYPE_CHECKING:
    from retrofit.console import Progress


NO_SINK = -1e4
"""The stored logit of a head without a sink: far below every score, in half precision too."""


@dataclass(frozen=True)
class Windows:
    """What is done to which layers. windowed: those that get the window. sinks: whether their heads get sinks, where
    the architecture has any. repair: whether the output projection is refitted."""

    size: int
    windowed: frozenset[int]
    sinks: bool
    repair: bool


class WindowedRun:
    """Two residual streams through the layers, windowing each on the way.

    text: to fit on. rows: of other text, on which the result is measured and repairs are checked. world: the processes
    that make this object and call it; batches are dealt out to them. work: rank 0's is taken, which all see.
    """

    def __init__(
        self,
        model: ModelFolder,
        windows: Windows,
        text: CalibrationText,
        rows: Repeats,
        *,
        work: Path,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        world: World = ALONE,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._windows, self._rows, self._dtype = model, windows, rows, dtype
        self._device, self._world, self._progress = device, world, progress
        self._autocast = product_dtype(device)
        tokens = calibration_tokens(device, model.spec, TOKENS_PER_BATCH)
        fitted = text.batches(tokens)
        self._folds = text.folds(tokens)
        self._batches = [*(ids for _, ids in fitted), *rows.input_ids_NR.split(max(1, tokens // rows.length))]
        self._own = own_share({i: ids.numel() for i, ids in enumerate(self._batches)}, world)
        layer, sizes = model.spec.layers[0], [tuple(ids.shape) for ids in self._batches]
        folder = world.share(work)
        self._targets = DiskTensors(
            folder / "targets", [(*size, model.spec.hidden_size) for size in sizes] if windows.repair else ()
        )
        self._heads = DiskTensors(folder / "heads", [(*size, layer.query_heads * layer.head_dim) for size in sizes])
        self._lse = DiskTensors(folder / "lse", [(size[0], layer.query_heads, size[1]) for size in sizes])
        self.work: LayerFolder[WindowLayerReport] = LayerFolder(
            folder,
            work_key(
                model.checkpoint,
                model.config.to_dict(),
                [VERSION, windows.size, sorted(windows.windowed), windows.sinks, windows.repair],
                [text.digest(), CalibrationText(rows.input_ids_NR, rows.kinds).digest()],
                [str(dtype), torch.device(device).type, str(self._autocast)],
            ),
            [(*size, model.spec.hidden_size) for size in sizes],
            WindowLayerReport.of,
            layers=len(model.spec.layers),
            within=(self._targets, self._heads, self._lse),
            to_the_end=True,
            device=device,
            own=self._own,
            world=world,
            say=progress.note if progress else lambda _: None,
        )
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    def all_layers(self) -> tuple[list[WindowLayerReport], Rise]:
        """Convert every layer that is not done yet; the changed tensors are in the work folder. Returns what was done,
        and what the loss on `rows` rises by, in nats per token."""
        work, layers, progress = self.work, self._model.spec.layers, self._progress
        if progress:
            if work.resumed_from:
                progress.note(f"windows resume after {work.resumed_from} of {len(layers)} layers")
            progress.start("fit windows", len(layers), "layers")
            progress.advance(work.layers_done)
        config, read = copy.deepcopy(self._model.config), self._model.checkpoint.tensor
        usual: Any = {"device": self._device, "autocast": self._autocast, "captures": True}
        stream = LayerStream(config, self._model.spec, read, **usual)
        if work.layers_done < len(layers):
            self._embed(stream)
        for layer in layers[work.layers_done :]:
            with stream.layer(layer.index) as run:
                tensors, report = self._layer(run, layer)
            work.finish_layer(report, {name: self._narrowed(name, tensor) for name, tensor in tensors.items()})
            if progress:
                progress.advance(1)
        if progress:
            progress.finish()
        return work.reports(), self._measured()

    def _embed(self, stream: LayerStream) -> None:
        fresh = self.work.resumed_from is None
        for i in self._own:
            hidden, self._kwargs[i] = stream.embed(self._batches[i])
            for name in STREAMS if fresh else ():
                self.work.stream(name, 0).write(i, hidden)
        stream.free_embeddings()
        if fresh:
            self.work.started()

    def _layer(self, run: LayerRun, layer: LayerAttention) -> tuple[dict[str, Tensor], WindowLayerReport]:
        """Convert a layer that is in memory, and write both streams behind it."""
        work, index = self.work, layer.index
        weights = read_layer(self._model.checkpoint.tensor, layer)
        x, x_converted = work.stream("original", index), work.stream("converted", index)
        for i in self._own:
            hidden, kwargs = x.read(i, self._device), self._kwargs[i][index]
            heads = as_it_is(run.attention_inputs(hidden, kwargs))
            after, attention = run.forward(hidden, kwargs, heads_BTN=heads)
            work.stream("original", index + 1).write(i, after)
            if self._windows.repair and index in self._windows.windowed:
                # The error of the layers before, as the output projection would have to make up for it.
                scale, undone = self._model.spec.residual_scale, hidden - x_converted.read(i, self._device)
                self._targets.write(i, attention if scale is None else attention + undone / scale)
        if index in self._windows.windowed:
            sinks_H, weights, report = self._window(run, layer, weights)
        else:
            sinks_H, report = None, WindowLayerReport(index, layer.window)
            for i in self._own:
                hidden = x_converted.read(i, self._device)
                self._heads.write(i, as_it_is(run.attention_inputs(hidden, self._kwargs[i][index])))
        # The output projection of a full layer is left alone: a refit would make it give what text misses elsewhere, at
        # the cost of what it finds far away.
        repairs = self._windows.repair and index in self._windows.windowed
        names = _names(layer.o_bias) if index in self._windows.windowed else []
        if repairs:
            names = _names(layer.o, layer.o_bias)
            weights, outcome = self._repaired(weights, sinks_H, index)
            report = replace(report, repairs=(outcome,))
            if outcome.accepted:
                run.load(write_layer(weights, layer, names))
        for i in self._own:
            hidden, kwargs = x_converted.read(i, self._device), self._kwargs[i][index]
            after, _ = run.forward(hidden, kwargs, heads_BTN=self._z(i, sinks_H))
            work.stream("converted", index + 1).write(i, after)
        if sinks_H is not None and layer.sinks is not None:
            weights, names = replace(weights, sinks_H=sinks_H.clamp_min(NO_SINK)), [*names, layer.sinks]
        return write_layer(weights, layer, names), report

    def _window(
        self, run: LayerRun, layer: LayerAttention, weights: LayerWeights
    ) -> tuple[Tensor, LayerWeights, WindowLayerReport]:
        """The sinks of a layer, [H], and its weights, whose output projection's bias, where it has one, gives back the
        mean of what is lost. Leaves what the heads give under the window on disk, without sinks."""
        size, stream = self._windows.size, self.work.stream("converted", layer.index)
        sums = WindowSums((size,), weights.o_CHD, self._device)
        for i in self._own:
            hidden = stream.read(i, self._device)
            inputs = run.attention_inputs(hidden, self._kwargs[i][layer.index])
            out, lse = under(inputs, size)
            if i < len(self._folds):
                everything = under(inputs, None)
                full, rows = with_sinks(*everything, inputs.sinks_H)[0], slice(0, hidden.shape[1])
                sums.add_rows(rows, full, out[None], lse[None], everything[1], token_weights(hidden))
            self._heads.write(i, joined(out))
            self._lse.write(i, lse)
        sums.together(self._world)
        moments, sinks = sums.finish(layer.index), self._windows.sinks and layer.sinks is not None
        centred = weights.o_bias_C is not None
        fit = self._world.only(lambda: fit_sinks(moments, sinks=sinks, centred=centred))
        if weights.o_bias_C is not None:
            mean_C = given_back(moments, fit, weights.o_CHD.cpu()).to(weights.o_bias_C)
            weights = replace(weights, o_bias_C=weights.o_bias_C + mean_C)
            run.load(write_layer(weights, layer, _names(layer.o_bias)))
        energy = float(fit.full_WH.sum())
        report = WindowLayerReport(
            layer.index,
            size,
            sinks=int((fit.sinks_WH[0] > -torch.inf).sum()),
            mass=float(moments.mass_WH[0].mean()),
            bare=float(fit.bare_WH.sum()) / energy,
            lost=float(fit.lost_WH.sum()) / energy,
        )
        return fit.sinks_WH[0].float(), weights, report

    def _z(self, batch: int, sinks_H: Tensor | None) -> Tensor:
        """What the output projection reads, [B, T, N]."""
        heads_BTN = self._heads.read(batch, self._device)
        if sinks_H is None:
            return heads_BTN
        lse_BHT = self._lse.read(batch, self._device)
        out_BHTD = heads_BTN.unflatten(2, (lse_BHT.shape[1], -1)).transpose(1, 2)
        return with_sinks(out_BHTD, lse_BHT, sinks_H.to(lse_BHT.device))[0].transpose(1, 2).flatten(2)

    def _repaired(
        self, weights: LayerWeights, sinks_H: Tensor | None, index: int
    ) -> tuple[LayerWeights, RepairOutcome]:
        """Weights with the output projection refitted, where that helps on text that it was not fitted to and makes no
        answers' error worse."""
        start_CN = weights.o_CHD.flatten(1, 2)
        if weights.o_bias_C is not None:
            start_CN = torch.cat([start_CN, weights.o_bias_C[:, None]], 1)
        width, columns = start_CN.shape
        sums = {fold: RidgeSums.nothing(columns, width) for fold in self._folds}
        guard = RidgeSums.nothing(columns, width)
        for i in self._own:
            z_BTN, target_BTC = self._z(i, sinks_H), self._targets.read(i, self._device)
            weight_BT = token_weights(self.work.stream("original", index).read(i, self._device)) * width
            if weights.o_bias_C is not None:
                z_BTN = torch.cat([z_BTN, torch.ones_like(z_BTN[..., :1])], -1)
            if i < len(self._folds):
                sums[self._folds[i]] += RidgeSums.of(z_BTN.flatten(0, 1), target_BTC.flatten(0, 1), weight_BT.flatten())
            else:
                at_P = self._rows.parts["answers"]
                z_TN, target_TC, weight_T = (x[:, at_P].flatten(0, 1) for x in (z_BTN, target_BTC, weight_BT))
                guard += RidgeSums.of(z_TN, target_TC, weight_T)
        sums = {fold: part.together(self._world) for fold, part in sums.items()}
        guard = guard.together(self._world)
        device = algebra_device(self._device, columns)
        ridge = self._world.only(lambda: refit(sums, start_CN.double(), device, guards=[guard]))
        outcome = RepairOutcome("o_proj", ridge.accepted, ridge.held_out_before, ridge.held_out_after)
        return with_output(weights, ridge.w_CN), outcome

    def _narrowed(self, name: str, tensor: Tensor) -> Tensor:
        return narrowed(tensor, self._dtype or self._model.checkpoint.main_dtype, name)

    def _measured(self) -> Rise:
        """What the loss on the rows rises by: both streams lie behind the last layer."""
        model, last = self._model, len(self._model.spec.layers)
        readout = Readout(model.config, model.spec, model.checkpoint.tensor, device=self._device)
        first, at_P = len(self._folds), self._rows.positions
        found: list[Mapping[str, float]] = []
        for name in STREAMS:
            stream, own = self.work.stream(name, last), {}
            for i in (i for i in self._own if i >= first):
                hidden = stream.read(i, self._device)[:, at_P]
                own[i] = readout.token_losses(hidden, self._batches[i][:, at_P + 1])
            losses = collected(own, self._world)
            found.append(self._rows.means(torch.cat([losses[i] for i in range(first, len(self._batches))])))
        before, after = found
        return Rise(**{part: after[part] - before[part] for part in after})


def _names(*slots: TensorSlot | None) -> list[str]:
    return [slot.name for slot in slots if slot is not None]
