"""Calibrated conversion, layer by layer: moments, merge, repairs, and both residual streams one layer on.

The stream of the original (X) and that of the layers converted so far (X~) lie on disk; in memory are one layer, the
Grams and a batch. The moments of X~ give the merge, and the repairs bring the layer's output back to the original's.

Legend: N sequences, B sequences of a batch, T tokens, C model width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from retrofit.checkpoint.cast import narrowed
from retrofit.checkpoint.read import Checkpoint
from retrofit.data.calibration import AVERAGED_TOKENS, CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.calibrate import moments as moment_files
from retrofit.kv_heads.calibrate.measure import layer_moments
from retrofit.kv_heads.calibrate.moments import LayerMoments
from retrofit.kv_heads.calibrate.residuals import STREAMS, Shapes, WorkFolder
from retrofit.kv_heads.calibrate.stream import LayerRun, LayerStream
from retrofit.kv_heads.disk import work_key
from retrofit.kv_heads.merge.folding import RotationAverages
from retrofit.kv_heads.merge.grouping import best_groups
from retrofit.kv_heads.merge.joint import (
    CALIBRATED,
    Groups,
    HeadMaps,
    MergeCost,
    MergeMethod,
    apply_maps,
    calibrated_maps,
    group_cost,
)
from retrofit.kv_heads.merge.qk_norm import KeyFit, can_fit, fit_keys
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer, write_layer
from retrofit.kv_heads.repair.outcome import LayerReport, RepairOutcome
from retrofit.kv_heads.repair.repair_inputs import LayerFiles, RepairInputs
from retrofit.kv_heads.repair.repairs import Repair, repair_layer
from retrofit.model.families import describe
from retrofit.model.load import product_dtype
from retrofit.model.spec import AttentionSpec, LayerAttention

if TYPE_CHECKING:
    from retrofit.console import Progress

TOKENS_PER_COLUMN = 50  # a fit with fewer learns its calibration text
# Where a norm or a multiplier stands between the output projection and the residual stream, the stream's error so far
# cannot be written into the projection's target.
_NORM_OR_SCALE_AFTER_ATTENTION = frozenset({"gemma2", "gemma3_text", "olmo2", "granite"})


@dataclass(frozen=True)
class Settings:
    """What a calibrated conversion does beside the text. averaged_tokens: tokens whose attention patterns average the
    values (0: values are merged as they are). keep_moments: leave the moments of every layer in the work folder.
    read_with: the configuration whose rotations keys are merged for, the model's own by default."""

    kv_heads: int
    method: MergeMethod
    method_name: str
    repairs: tuple[Repair, ...]
    averaged_tokens: int = AVERAGED_TOKENS
    keep_moments: bool = False
    read_with: PretrainedConfig | None = None


class CalibratedRun:
    """Two residual streams through the layers, converting each on the way."""

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
        progress: Progress | None,
    ) -> None:
        autocast = product_dtype(device)
        self._checkpoint, self._settings, self._dtype = checkpoint, settings, dtype
        self._device, self._progress = device, progress
        self._spec, self._target_spec = spec or describe(config), describe(target)
        read_with = settings.read_with
        self._turnings = RotationAverages(config, self._spec) if read_with is None else RotationAverages(read_with)
        self._batches, self._folds = text.batches(), text.folds()
        self.notes = [*text.notes, *_notes(self._spec, settings, text)]
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
            work,
            self._key(target, text, str(autocast)),
            Shapes.of(shapes, self._spec.hidden_size, first.query_heads * first.head_dim),
            layers=len(self._spec.layers),
            repairs=bool(settings.repairs),
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
            cast = {name: narrowed(tensor, self._written(name), name) for name, tensor in tensors.items()}
            work.finish_layer(report, cast)
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
        for i, (_, ids) in enumerate(self._batches):
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
            moments = self._moments(original, weights, layer)
            if self._settings.keep_moments:
                moment_files.save(work.moments, index, moments)
            maps, cost, groups = self._merge(moments, weights, layer)
            fit: KeyFit | None = None
            if fits_keys(layer, self._settings.method):
                fit = fit_keys(weights, maps, groups, layer, partial(self._inputs, original, index))
            for i in range(len(self._batches)):
                hidden = x.read(i, self._device)
                after, attention = original.forward(hidden, self._named(i, index))
                work.stream("original", index + 1).write(i, after)
                if self._settings.repairs:
                    undone = hidden - x_converted.read(i, self._device) if plain_residual(self._spec) else 0.0
                    work.targets.write(i, attention + undone)
        merged = apply_maps(weights, maps, groups) if fit is None else fit.weights
        lost, fitted = (cost.keys, None) if fit is None else (fit.lost, fit.accepted)
        del weights, moments, maps, fit
        outcomes: tuple[RepairOutcome, ...] = ()
        with self._converted.layer(index, write_layer(merged, target_layer)) as run:
            inputs: RepairInputs | None = None
            if self._settings.repairs:
                files = LayerFiles(x, x_converted, work.targets, work.heads)
                inputs = RepairInputs(
                    target_layer, run, merged, self._folds, files, lambda i: self._named(i, index), self._device
                )
                merged, outcomes = repair_layer(self._settings.repairs, inputs, merged)
            for i in range(len(self._batches)):
                heads = inputs.heads(i) if inputs else None
                after, _ = run.forward(x_converted.read(i, self._device), self._named(i, index), heads_BTN=heads)
                work.stream("converted", index + 1).write(i, after)
        report = LayerReport(index, groups, lost, fitted, cost.values, outcomes)
        return write_layer(merged, target_layer), report

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
        )

    def _inputs(self, original: LayerRun, layer: int) -> Iterator[tuple[bool, Tensor]]:
        """What the projections read, batch by batch; about a quarter of each kind of text is held out."""
        kinds = [kind for kind, _ in self._batches]
        stream = self.work.stream("converted", layer)
        for i, kind in enumerate(kinds):
            place, period = kinds[:i].count(kind), min(4, kinds.count(kind))
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
            [str(self._dtype), self._device, autocast],
        )


def plain_residual(spec: AttentionSpec) -> bool:
    """Whether the output projection's result is added to the residual stream as it is."""
    return spec.family not in _NORM_OR_SCALE_AFTER_ATTENTION


def require_left_out(fewest: int, spec: AttentionSpec, method: MergeMethod | None, *, repairs: bool) -> None:
    """UserError where a fit is checked on sequences left out of it and a kind of text has `fewest` sequences, not two.

    method: None for one that is not calibrated.
    """
    if fewest >= 2:
        return
    if repairs:
        raise UserError(
            "too little calibration text to check a repair on sequences it was not fitted on",
            where="convert.calibration",
            fix="give at least two sequences of each kind of text, or set repair: none",
        )
    if method is not None and any(fits_keys(layer, method) for layer in spec.layers):
        raise UserError(
            "too little calibration text to check fitted keys on sequences they were not fitted on",
            where="convert.calibration",
            fix="give at least two sequences of each kind of text, or choose the method `mean`",
        )


def fits_keys(layer: LayerAttention, method: MergeMethod) -> bool:
    """Whether a layer's keys are fitted through their norm; merges for comparison know nothing of that."""
    return can_fit(layer) and method is CALIBRATED


def pooled_keys(reports: Sequence[LayerReport]) -> list[str]:
    """A note on layers whose fitted keys were no better than pooled ones."""
    pooled = [str(report.index) for report in reports if report.keys_fitted is False]
    if not pooled:
        return []
    return [f"keys of layers {', '.join(pooled)} are mean-pooled: fitted ones were no better on text left out"]


def _notes(spec: AttentionSpec, settings: Settings, text: CalibrationText) -> list[str]:
    """What calibration cannot do on this model or with this text."""
    notes = []
    if any(layer.qk_norm and not fits_keys(layer, settings.method) for layer in spec.layers):
        notes.append(
            "keys are mean-pooled: the norm on queries and keys takes the magnitudes that this merge of keys needs; "
            "values and output projection are merged as asked"
        )
    if settings.repairs and not plain_residual(spec):
        notes.append(
            f"{spec.family} scales or normalises the attention output: the repair restores each layer's own output, "
            "and not the error of the layers before"
        )
    if any(layer.clip_qkv for layer in spec.layers):
        notes.append(
            "the clamp on q, k and v (clip_qkv) is not part of the moments; converted heads are clamped as before"
        )
    if settings.repairs and len(text.tokens_by_kind) == 1:
        notes.append("one kind of calibration text: the repair was checked on other sequences of the same kind only")
    tokens = text.input_ids_NT.numel()
    normed = [layer for layer in spec.layers if fits_keys(layer, settings.method)]
    if normed:
        columns = normed[0].kv_heads // settings.kv_heads * normed[0].head_dim + (normed[0].k_bias is not None)
        notes += _few_tokens("the merge of normalised keys", columns, tokens)
    layer = spec.layers[0]
    for repair in settings.repairs:
        columns = repair.columns(layer.query_heads, layer.head_dim, layer.o_bias is not None)
        notes += _few_tokens(f"the repair {repair.name}", columns, tokens)
    return notes


def _few_tokens(what: str, columns: int, tokens: int) -> list[str]:
    """A note on a least-squares fit with too little text, [] where there is enough."""
    if tokens >= TOKENS_PER_COLUMN * columns:
        return []
    return [
        f"{what} fits {columns:,} columns on {tokens:,} calibration tokens, {tokens / columns:.1f} a column; with "
        f"fewer than {TOKENS_PER_COLUMN} it learns its calibration text: raise convert.calibration.tokens (--tokens) "
        f"to {TOKENS_PER_COLUMN * columns:,}"
    ]
