"""Calibrated conversion, layer by layer: moments, merge, repairs, and both residual streams one layer on.

The stream of the original (X) and that of the layers converted so far (X~) lie on disk; in memory are one layer, the
Grams and a batch. The moments of X~ give the merge, and the repairs bring the layer's output back to the original's.

Legend: N sequences, B sequences of a batch, T tokens, C model width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from retrofit.checkpoint.cast import narrowed
from retrofit.checkpoint.read import Checkpoint
from retrofit.data.calibration import TOKENS_PER_BATCH, CalibrationText
from retrofit.kv_heads.calibrate import moments as moment_files
from retrofit.kv_heads.calibrate.measure import layer_moments
from retrofit.kv_heads.calibrate.moments import LayerMoments
from retrofit.kv_heads.calibrate.residuals import STREAMS, Shapes, WorkFolder
from retrofit.kv_heads.calibrate.settings import Settings, fits_keys, notes_on, require_left_out
from retrofit.kv_heads.calibrate.stream import LayerRun, LayerStream
from retrofit.kv_heads.disk import work_key
from retrofit.kv_heads.merge.folding import RotationAverages
from retrofit.kv_heads.merge.grouping import best_groups
from retrofit.kv_heads.merge.joint import (
    CALIBRATED,
    Groups,
    HeadMaps,
    MergeCost,
    apply_maps,
    calibrated_maps,
    group_cost,
)
from retrofit.kv_heads.merge.qk_norm import fit_keys
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer, write_layer
from retrofit.kv_heads.repair.outcome import LayerReport, RepairOutcome
from retrofit.kv_heads.repair.repair_inputs import LayerFiles, RepairInputs
from retrofit.kv_heads.repair.repairs import repair_layer
from retrofit.model.families import describe
from retrofit.model.load import product_dtype
from retrofit.model.spec import AttentionSpec, LayerAttention
from retrofit.system.dealing import own_share
from retrofit.system.device import calibration_tokens
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from retrofit.console import Progress


class CalibratedRun:
    """Two residual streams through the layers, converting each on the way.

    world: the processes that make this object and call it. Batches of sequences are dealt out to them; sums are over
    all, and what is merged, fitted or accepted is decided by rank 0 for all. work: rank 0's is taken, which all see.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        target: PretrainedConfig,
        settings: Settings,
        text: CalibrationText,
        *,
        work: Path,
        device: str,
        dtype: torch.dtype | None,
        spec: AttentionSpec | None = None,
        world: World = ALONE,
        progress: Progress | None,
    ) -> None:
        autocast = product_dtype(device)
        self._checkpoint, self._settings, self._dtype = checkpoint, settings, dtype
        self._device, self._progress = device, progress
        self._spec, self._target_spec = spec or describe(config), describe(target)
        read_with = settings.read_with
        self._turnings = RotationAverages(config, self._spec) if read_with is None else RotationAverages(read_with)
        tokens = calibration_tokens(device, self._spec, TOKENS_PER_BATCH)
        self._batches, self._folds = text.batches(tokens), text.folds(tokens)
        self._world = world
        self._own = own_share({i: ids.numel() for i, (_, ids) in enumerate(self._batches)}, world)
        if progress and len(self._batches) < world.size:
            progress.note(f"{len(self._batches)} batches of text for {world.size} processes: some have none to read")
        self.notes = [*text.notes, *notes_on(self._spec, settings, text)]
        fewest = min(text.kinds.count(kind) for kind in text.tokens_by_kind)
        require_left_out(fewest, self._spec, settings.method, repairs=bool(settings.repairs))
        self._original = LayerStream(
            copy.deepcopy(config), self._spec, checkpoint.tensor, device=device, autocast=autocast
        )
        self._converted = LayerStream(target, self._target_spec, checkpoint.tensor, device=device, autocast=autocast)
        self._kwargs: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        shapes = [(ids.shape[0], ids.shape[1]) for _, ids in self._batches]
        first = self._spec.layers[0]
        self.work = WorkFolder(
            world.share(work),
            self._key(target, text, str(autocast)),
            Shapes.of(shapes, self._spec.hidden_size, first.query_heads * first.head_dim),
            layers=len(self._spec.layers),
            repairs=bool(settings.repairs),
            device=device,
            own=self._own,
            world=world,
            say=progress.note if progress else lambda _: None,
        )

    def all_layers(self) -> list[LayerReport]:
        """Convert every layer that is not done yet; the changed tensors are in the work folder."""
        work, layers = self.work, self._spec.layers
        if self._progress:
            if work.resumed_from:
                self._progress.note(f"calibration resumes after {work.resumed_from} of {len(layers)} layers")
            self._progress.start("convert heads", len(layers), "layers")
            self._progress.advance(work.layers_done)
        if work.layers_done < len(layers):
            self._embed()
        for layer in layers[work.layers_done :]:
            tensors, report = self._layer(layer)
            if self._world.main:
                tensors = {name: narrowed(tensor, self._written(name), name) for name, tensor in tensors.items()}
            work.finish_layer(report, tensors)
            if self._progress:
                self._progress.advance(1, **{"keys lost": report.keys or 0.0, "values lost": report.values or 0.0})
        if self._progress:
            self._progress.finish()
        work.drop_streams()
        return work.reports()

    def _embed(self) -> None:
        """Both streams into layer 0, and the keyword arguments of every shape of batch; a resumed run needs only
        these."""
        fresh = self.work.resumed_from is None
        for i in self._own:
            ids = self._batches[i][1]
            if fresh or tuple(ids.shape) not in self._kwargs:
                hidden, self._kwargs[tuple(ids.shape)] = self._original.embed(ids)
                for name in STREAMS if fresh else ():
                    self.work.stream(name, 0).write(i, hidden)
        single = self._batches[0][1][:1]  # for averaged values
        self._kwargs[tuple(single.shape)] = self._original.embed(single)[1]
        self._original.free_embeddings()
        if fresh:
            self.work.started()

    def _layer(self, layer: LayerAttention) -> tuple[dict[str, Tensor], LayerReport]:
        """Convert one layer and write both streams behind it."""
        work, index = self.work, layer.index
        weights, target_layer = read_layer(self._checkpoint.tensor, layer), self._target_spec.layers[index]
        x, x_converted = work.stream("original", index), work.stream("converted", index)
        with self._original.layer(index) as original:
            merged, report = self._merged(original, weights, layer)
            del weights
            for i in self._own:
                hidden = x.read(i, self._device)
                after, attention = original.forward(hidden, self._named(i, index))
                work.stream("original", index + 1).write(i, after)
                if self._settings.repairs:
                    # The error of the layers before, as the output projection would have to make up for it.
                    scale, undone = self._spec.residual_scale, hidden - x_converted.read(i, self._device)
                    work.targets.write(i, attention if scale is None else attention + undone / scale)
        outcomes: tuple[RepairOutcome, ...] = ()
        with self._converted.layer(index, write_layer(merged, target_layer)) as run:
            inputs: RepairInputs | None = None
            if self._settings.repairs:
                files = LayerFiles(x, x_converted, work.targets, work.heads)
                inputs = RepairInputs(
                    target_layer,
                    run,
                    merged,
                    self._folds,
                    files,
                    lambda i: self._named(i, index),
                    self._device,
                    self._own,
                    self._world,
                )
                merged, outcomes = repair_layer(self._settings.repairs, inputs, merged)
            for i in self._own:
                heads = inputs.heads(i) if inputs else None
                after, _ = run.forward(x_converted.read(i, self._device), self._named(i, index), heads_BTN=heads)
                work.stream("converted", index + 1).write(i, after)
        return write_layer(merged, target_layer), replace(report, repairs=outcomes)

    def _merged(
        self, original: LayerRun, weights: LayerWeights, layer: LayerAttention
    ) -> tuple[LayerWeights, LayerReport]:
        """The merged weights of a layer that is in memory, before any repair; the same in every process."""
        world, moments = self._world, self._moments(original, weights, layer)
        if self._settings.keep_moments and world.main:
            moment_files.save(self.work.moments, layer.index, moments)
        maps, cost, groups = world.only(lambda: self._merge(moments, weights, layer))
        if not fits_keys(layer, self._settings.method):
            merged = world.only(lambda: apply_maps(weights, maps, groups))
            return merged, LayerReport(layer.index, groups, cost.keys, None, cost.values)
        fit = fit_keys(weights, maps, groups, layer, partial(self._inputs, original, layer.index), world)
        return fit.weights, LayerReport(layer.index, groups, fit.lost, fit.accepted, cost.values)

    def _moments(self, original: LayerRun, weights: LayerWeights, layer: LayerAttention) -> LayerMoments:
        stream, tokens = self.work.stream("converted", layer.index), self._batches[0][1].shape[1]
        return layer_moments(
            original,
            weights,
            layer,
            self._batches,
            lambda i: stream.read(i, self._device),
            lambda i: self._named(i, layer.index),
            self._kwargs[1, tokens][layer.index],
            averaged_tokens=self._settings.averaged_tokens if self._settings.method.averaged else 0,
            own=self._own,
            world=self._world,
        )

    def _inputs(self, original: LayerRun, layer: int) -> Iterator[tuple[bool, Tensor]]:
        """What the projections read, batch by batch of this process; about a quarter of each kind of text is held
        out."""
        kinds = [kind for kind, _ in self._batches]
        stream = self.work.stream("converted", layer)
        for i in self._own:
            place, period = kinds[:i].count(kinds[i]), min(4, kinds.count(kinds[i]))
            a_BTC = original.attention_input(stream.read(i, self._device), self._named(i, layer))
            yield place % period == period - 1, a_BTC.flatten(0, 1)

    def _named(self, batch: int, layer: int) -> dict[str, Any]:
        """Keyword arguments of a layer for a batch; they depend on its shape alone."""
        return self._kwargs[tuple(self._batches[batch][1].shape)][layer]

    def _written(self, name: str) -> torch.dtype:
        """The dtype that a changed tensor is written in."""
        return self._dtype or self._checkpoint.dtype(name)

    def _merge(
        self, moments: LayerMoments, weights: LayerWeights, layer: LayerAttention
    ) -> tuple[HeadMaps, MergeCost, Groups]:
        calibrate_keys = layer.qk_norm is None or fits_keys(layer, self._settings.method)
        cost = group_cost(moments, weights, layer.rope, keys=calibrate_keys)
        groups = best_groups(layer.kv_heads, self._settings.kv_heads, cost)
        maps, lost = calibrated_maps(
            moments,
            weights,
            groups,
            layer.rope,
            method=self._settings.method,
            keys=calibrate_keys,
            # Merges for comparison know nothing of pairs that share places.
            turning=self._turnings.of(layer.index) if self._settings.method is CALIBRATED else None,
        )
        return maps, lost, groups

    def _key(self, target: PretrainedConfig, text: CalibrationText, autocast: str) -> str:
        """Names everything that the work folder's bytes depend on."""
        settings = self._settings
        repairs = [repr(repair) for repair in settings.repairs]
        return work_key(
            self._checkpoint,
            target.to_dict(),
            [settings.method_name, repairs, settings.averaged_tokens, settings.keep_moments],
            None if settings.read_with is None else settings.read_with.to_dict(),
            text.digest(),
            [str(self._dtype), torch.device(self._device).type, autocast],
        )
