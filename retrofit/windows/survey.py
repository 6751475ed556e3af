"""One pass over the original, layer by layer: what every layer's heads lose under every window.

The residual stream lies on disk (`StreamFolder`): memory is one layer, its sums, a batch and a chunk of scores. A pass
that was killed resumes at its layer.

Legend: B sequences of a batch, T tokens, C model width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.data.calibration import TOKENS_PER_BATCH, CalibrationText
from retrofit.kernels.captured import AttentionInputs
from retrofit.kernels.sinks import with_sinks
from retrofit.kv_heads.calibrate.stream import LayerRun, LayerStream
from retrofit.kv_heads.disk import StreamFolder, work_key
from retrofit.kv_heads.merge.weights import read_layer
from retrofit.model.folder import ModelFolder
from retrofit.model.load import product_dtype
from retrofit.model.spec import LayerAttention
from retrofit.system.dealing import own_share
from retrofit.system.device import calibration_tokens
from retrofit.system.world import ALONE, World
from retrofit.windows import VERSION
from retrofit.windows.heads import joined, under
from retrofit.windows.moments import WindowSums
from retrofit.windows.rows import Repeats
from retrofit.windows.store import LayerMoments, load, save

if TYPE_CHECKING:
    from retrofit.console import Progress

STREAM = "original"


def survey(
    model: ModelFolder,
    text: CalibrationText,
    rows: Repeats,
    windows: Sequence[int],
    moments: Path,
    *,
    work: Path,
    device: str = "cpu",
    world: World = ALONE,
    progress: Progress | None = None,
) -> None:
    """Write the moments of every layer to the folder `moments`.

    text: to fit on. rows: whose second copies are answers. work: a folder for the stream, from which a later call with
    the same arguments resumes; the caller removes it. world: the processes that make this call; batches are dealt out
    to them. Raises UserError for moments that are not finite, and where the disk has no room for the stream.
    """
    _Survey(model, text, rows, tuple(windows), moments, work, device, world, progress).run()


class _Survey:
    def __init__(
        self,
        model: ModelFolder,
        text: CalibrationText,
        rows: Repeats,
        windows: tuple[int, ...],
        moments: Path,
        work: Path,
        device: str,
        world: World,
        progress: Progress | None,
    ) -> None:
        self._model, self._rows, self._windows = model, rows, windows
        self._moments, self._device, self._world, self._progress = world.share(moments), device, world, progress
        self._autocast = product_dtype(device)
        tokens = calibration_tokens(device, model.spec, TOKENS_PER_BATCH)
        fitted = [ids for _, ids in text.batches(tokens)]
        self._fitted = len(fitted)
        self._batches = [*fitted, *rows.input_ids_NR.split(max(1, tokens // rows.length))]
        self._own = own_share({i: ids.numel() for i, ids in enumerate(self._batches)}, world)
        key = work_key(
            model.checkpoint,
            model.config.to_dict(),
            [VERSION, text.digest(), CalibrationText(rows.input_ids_NR, rows.kinds).digest(), windows, rows.window],
            [torch.device(device).type, str(self._autocast)],
        )
        self._folder = StreamFolder(
            world.share(work),
            key,
            (STREAM,),
            [(*ids.shape, model.spec.hidden_size) for ids in self._batches],
            layers=len(model.spec.layers),
            whole=partial(load, self._moments),
            device=device,
            own=self._own,
            world=world,
            say=progress.note if progress else lambda _: None,
        )

    def run(self) -> None:
        folder, layers, progress = self._folder, self._model.spec.layers, self._progress
        if progress:
            if folder.resumed_from:
                progress.note(f"the survey of windows resumes after {folder.resumed_from} of {len(layers)} layers")
            progress.start("measure what windows lose", len(layers), "layers")
            progress.advance(folder.layers_done)
        if folder.layers_done < len(layers):
            self._layers()
        if progress:
            progress.finish()
        folder.drop_streams()

    def _layers(self) -> None:
        model, folder = self._model, self._folder
        config, read = copy.deepcopy(model.config), model.checkpoint.tensor
        usual: Any = {"device": self._device, "autocast": self._autocast, "captures": True}
        stream, kwargs = LayerStream(config, model.spec, read, **usual), {}
        for i in self._own:
            hidden, kwargs[i] = stream.embed(self._batches[i])
            if folder.resumed_from is None:
                folder.stream(STREAM, 0).write(i, hidden)
        stream.free_embeddings()
        if folder.resumed_from is None:
            folder.started()
        for layer in model.spec.layers[folder.layers_done :]:
            with stream.layer(layer.index) as run:
                found = self._layer(run, layer, {i: kwargs[i][layer.index] for i in self._own})
            if self._world.main:
                save(self._moments, layer.index, found)
            folder.finished(layer.index)
            if self._progress:
                self._progress.advance(1)

    def _layer(self, run: LayerRun, layer: LayerAttention, kwargs: dict[int, dict[str, Any]]) -> LayerMoments:
        """Moments of a layer that is in memory; writes the stream behind it."""
        o_CHD = read_layer(self._model.checkpoint.tensor, layer).o_CHD
        text = WindowSums(self._windows, o_CHD, self._device)
        answers = WindowSums((self._rows.window,), o_CHD, self._device)
        x, after = (self._folder.stream(STREAM, layer.index + i) for i in (0, 1))
        for i in self._own:
            hidden = x.read(i, self._device)
            inputs = run.attention_inputs(hidden, kwargs[i])
            weight_BT = token_weights(hidden)
            if i < self._fitted:
                heads = _added(text, inputs, weight_BT)
            else:
                counted_BT = torch.zeros_like(weight_BT)
                at_P = self._rows.parts["answers"]
                counted_BT[:, at_P] = weight_BT[:, at_P]
                heads = _added(answers, inputs, counted_BT)
            after.write(i, run.forward(hidden, kwargs[i], heads_BTN=heads)[0])
        for sums in (text, answers):
            sums.together(self._world)
        return LayerMoments(text.finish(layer.index), answers.finish(layer.index))


def _added(sums: WindowSums, inputs: AttentionInputs, weight_BT: Tensor) -> Tensor:
    """Add a batch, with one window by flash attention, which is several times as fast as bands; returns what the heads
    give without windows, [B, T, H D]."""
    if len(sums.windows) > 1:
        return sums.add(inputs, weight_BT)
    out, lse = under(inputs, sums.windows[0])
    whole, whole_lse = under(inputs, None)
    full = with_sinks(whole, whole_lse, inputs.sinks_H)[0]
    sums.add_rows(slice(0, full.shape[2]), full, out[None], lse[None], whole_lse, weight_BT)
    return joined(full)


def token_weights(hidden_BTC: Tensor) -> Tensor:
    """1 / |h|^2 of every token's residual stream, [B, T]: errors are shares of what they are added to, and the few
    tokens with massive activations do not own a sum."""
    return 1.0 / hidden_BTC.float().square().sum(-1).clamp_min(1e-8)
