"""Conversion of a checkpoint to fewer KV heads, layer by layer, into the same native architecture.

`first` and `mean` change weights alone. `calibrated` (and `procrustes` and `real-pca`, to compare) runs two residual
streams over the calibration text, that of the original (X) and that of the layers converted so far (X~): the moments of
X~ give the merge, and a ridge refits the output projection.

Legend: N sequences, B sequences of a batch, T tokens, C model width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.rewrite import Rule, rewrite
from retrofit.checkpoint.write import copy_side_files
from retrofit.errors import UserError
from retrofit.kv_heads.baselines import METHODS
from retrofit.kv_heads.grouping import best_groups
from retrofit.kv_heads.merge import (
    CALIBRATED,
    Groups,
    HeadMaps,
    MergeCost,
    MergeMethod,
    apply_maps,
    calibrated_maps,
    contiguous_groups,
    first_maps,
    group_cost,
    mean_maps,
    rotary_indices,
)
from retrofit.kv_heads.moments import LayerMoments, MomentSums
from retrofit.kv_heads.qk_norm import KeyFit, can_fit, fit_keys, project, queries_and_keys
from retrofit.kv_heads.refit import Ridge, RidgeSums, refit
from retrofit.kv_heads.stream import LayerRun, LayerStream
from retrofit.kv_heads.weights import LayerWeights, Reader, read_layer, write_layer
from retrofit.model.families import describe, family_of
from retrofit.model.load import load_config, multiplies_in_bfloat16
from retrofit.model.spec import AttentionSpec, LayerAttention
from retrofit.recipe.schema import Method

if TYPE_CHECKING:
    from retrofit.console import Progress

_TOKENS_PER_BATCH = 8192
# Where a norm or a multiplier stands between the output projection and the residual stream, the stream's error so far
# cannot be written into the projection's target.
_NORM_OR_SCALE_AFTER_ATTENTION = frozenset({"gemma2", "gemma3_text", "olmo2", "granite"})


@dataclass(frozen=True)
class LayerReport:
    """What conversion did to one layer.

    keys, values: share of the scores' and of the attention output's energy that the merge gives up, 0 to 1 (None
    where it was not computed). keys_fitted: with a norm on keys, whether fitted keys were kept (else mean-pooled ones).
    held_out_before/after: error of the attention output on text the repair was not
    fitted on, as a share of the target's energy. repair: whether the refitted output projection was kept.
    """

    index: int
    groups: Groups
    keys: float | None = None
    keys_fitted: bool | None = None
    values: float | None = None
    repair: bool | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None


@dataclass(frozen=True)
class ConvertReport:
    """What conversion did. tokens: calibration tokens. notes: everything that was not done as asked, and why."""

    method: str
    kv_heads_before: int
    kv_heads_after: int
    layers: tuple[LayerReport, ...]
    tokens: int
    kinds: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationText:
    """Token ids [N, T] and the kind of text of each of the N sequences."""

    input_ids_NT: Tensor
    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.kinds) == self.input_ids_NT.shape[0]

    def batches(self) -> list[tuple[str, Tensor]]:
        """(kind, ids [B, T]) of one kind each, at most `_TOKENS_PER_BATCH` tokens and half of the kind's sequences."""
        out = []
        for kind in dict.fromkeys(self.kinds):
            rows = [i for i, k in enumerate(self.kinds) if k == kind]
            size = max(1, min(_TOKENS_PER_BATCH // self.input_ids_NT.shape[1], len(rows) // 2))
            out += [(kind, self.input_ids_NT[rows[i : i + size]]) for i in range(0, len(rows), size)]
        return out


def convert(
    source: str | Path,
    out: Path,
    *,
    kv_heads: int,
    method: Method = "calibrated",
    repair: Literal["o_proj", "none"] = "o_proj",
    text: CalibrationText | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> ConvertReport:
    """Write `source` with `kv_heads` KV heads per layer into the (existing, staged) folder `out`.

    dtype: of the written weights, the source's own by default. The calibration streams are fp32, their matrix products
    bfloat16 where the processor has them.

    Raises UserError where the architecture or the number of heads does not allow it, and where a method that
    calibrates has no text.
    """
    started = time.monotonic()
    checkpoint = Checkpoint.open(source)
    config = load_config(source)
    spec = describe(config)
    target = family_of(config).with_kv_heads(config, kv_heads)
    before, written = spec.layers[0].kv_heads, describe(target)
    notes: list[str] = []
    if kv_heads == before:
        notes.append(f"the model already has {before} KV heads: its weights are copied unchanged")
        reports = [LayerReport(layer.index, contiguous_groups(before, before)) for layer in spec.layers]
        changed: dict[str, Tensor] = {}
    elif method in METHODS:
        if text is None:
            raise UserError(
                f"the method `{method}` needs text to calibrate on",
                where="convert.calibration.text",
                fix="name text (`--calibrate TEXT`), or choose `--method mean`",
            )
        notes += _fallbacks(spec, METHODS[method], repair)
        run = _CalibratedRun(checkpoint, config, target, spec, kv_heads, METHODS[method], repair, text, device)
        changed, reports = run.all_layers(progress)
        notes += run.notes
        pooled = [str(report.index) for report in reports if report.keys_fitted is False]
        if pooled:
            notes.append(
                f"keys of layers {', '.join(pooled)} are mean-pooled: fitted ones were no better on text left out"
            )
    else:
        changed, reports = {}, []
        for layer in spec.layers:
            maps = (mean_maps if method == "mean" else first_maps)(before, kv_heads, layer.head_dim)
            groups = contiguous_groups(before, kv_heads)
            merged = apply_maps(read_layer(checkpoint.tensor, layer), maps, groups)
            changed |= write_layer(merged, written.layers[layer.index])
            reports.append(LayerReport(layer.index, groups))
    rewrite(
        checkpoint,
        out,
        _rules(changed, spec, kv_heads),
        config=target,
        dtype=dtype,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    copy_side_files(source, out)
    return ConvertReport(
        method=method,
        kv_heads_before=before,
        kv_heads_after=kv_heads,
        layers=tuple(reports),
        tokens=0 if text is None or method not in METHODS else text.input_ids_NT.numel(),
        kinds=() if text is None or method not in METHODS else tuple(dict.fromkeys(text.kinds)),
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def _rules(changed: dict[str, Tensor], spec: AttentionSpec, kv_heads: int) -> dict[str, Rule | None]:
    """Rewrite rules: changed tensors replaced, per-head norms of heads that are gone dropped."""

    def replaced(tensor: Tensor) -> Rule:
        return lambda name, _old: [(name, tensor)]

    rules: dict[str, Rule | None] = {name: replaced(tensor) for name, tensor in changed.items()}
    for layer in spec.layers:
        if layer.k_norm is not None and layer.qk_norm_weights == "separate":
            rules |= {layer.k_norm.format(head=head): None for head in range(kv_heads, layer.kv_heads)}
    return rules


def _fallbacks(spec: AttentionSpec, method: MergeMethod, repair: str) -> list[str]:
    notes = []
    if any(layer.qk_norm and not _fits_keys(layer, method) for layer in spec.layers):
        notes.append(
            "keys are mean-pooled: the norm on queries and keys takes the magnitudes that this merge of keys needs; "
            "values and output projection are merged as asked"
        )
    if repair == "o_proj" and not _plain_residual(spec):
        notes.append(
            f"{spec.family} scales or normalises the attention output: the repair restores each layer's own output, "
            "and not the error of the layers before"
        )
    if any(layer.clip_qkv for layer in spec.layers):
        notes.append(
            "the clamp on q, k and v (clip_qkv) is not part of the moments; converted heads are clamped as before"
        )
    return notes


class _CalibratedRun:
    """Two residual streams through the layers, converting each on the way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        target: PretrainedConfig,
        spec: AttentionSpec,
        kv_heads: int,
        method: MergeMethod,
        repair: str,
        text: CalibrationText,
        device: str,
    ) -> None:
        autocast = torch.bfloat16 if multiplies_in_bfloat16(device) else None
        self._read: Reader = checkpoint.tensor
        self._spec, self._target_spec = spec, describe(target)
        self._kv_heads, self._method, self._repair = kv_heads, method, repair
        self._original = LayerStream(copy.deepcopy(config), spec, self._read, device=device, autocast=autocast)
        self._converted = LayerStream(target, self._target_spec, self._read, device=device, autocast=autocast)
        self._batches = text.batches()
        self.notes: list[str] = []
        # The ridge is checked on parts of each kind, and on kinds, that a trial fit does not see.
        batches_of = {kind: [i for i, (k, _) in enumerate(self._batches) if k == kind] for kind, _ in self._batches}
        self._folds = [(kind, batches_of[kind].index(i) % 2) for i, (kind, _) in enumerate(self._batches)]
        if repair != "none" and min(map(len, batches_of.values())) < 2:
            raise UserError(
                "too little calibration text to check a repair on sequences it was not fitted on",
                where="convert.calibration",
                fix="give at least two sequences of each kind of text, or set repair: none",
            )
        if min(map(len, batches_of.values())) < 2 and any(_fits_keys(layer, method) for layer in spec.layers):
            raise UserError(
                "too little calibration text to check fitted keys on sequences they were not fitted on",
                where="convert.calibration",
                fix="give at least two sequences of each kind of text, or choose the method `mean`",
            )
        if repair != "none" and len(batches_of) == 1:
            self.notes.append(
                "one kind of calibration text: the repair was checked on other sequences of the same kind only"
            )

    def all_layers(self, progress: Progress | None) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Changed tensors of every layer by name, and a report of each."""
        embedded = [self._original.embed(ids) for _, ids in self._batches]
        x = [hidden for hidden, _ in embedded]
        x_converted = list(x)
        kwargs = [per_layer for _, per_layer in embedded]
        changed: dict[str, Tensor] = {}
        reports = []
        if progress:
            progress.start("convert heads", len(self._spec.layers), "layers")
        for layer in self._spec.layers:
            named = [per_layer[layer.index] for per_layer in kwargs]
            tensors, report = self._layer(layer, x, x_converted, named)
            changed |= tensors
            reports.append(report)
            if progress:
                fields = {"keys lost": report.keys or 0.0, "values lost": report.values or 0.0}
                progress.advance(1, **fields)
        if progress:
            progress.finish()
        return changed, reports

    def _layer(
        self, layer: LayerAttention, x: list[Tensor], x_converted: list[Tensor], kwargs: list[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], LayerReport]:
        """Convert one layer and move both streams past it (the lists are updated in place)."""
        weights = read_layer(self._read, layer)
        target_layer = self._target_spec.layers[layer.index]
        weight_T = [1.0 / h.square().mean(-1).flatten().clamp_min(1e-8) for h in x]
        targets = []
        with self._original.layer(layer.index) as original:
            moments = self._moments(original, weights, layer, x_converted, kwargs)
            maps, cost, groups = self._merge(moments, weights, layer)
            fit: KeyFit | None = None
            if _fits_keys(layer, self._method):
                fit = fit_keys(weights, maps, groups, layer, partial(self._inputs, original, x_converted, kwargs))
            for i, hidden in enumerate(x):
                after, attention = original.forward(hidden, kwargs[i])
                targets.append(attention + (hidden - x_converted[i]) if _plain_residual(self._spec) else attention)
                x[i] = after
        merged = apply_maps(weights, maps, groups) if fit is None else fit.weights
        ridge: Ridge | None = None
        with self._converted.layer(layer.index, write_layer(merged, target_layer)) as run:
            heads = [run.head_outputs(hidden, named) for hidden, named in zip(x_converted, kwargs, strict=True)]
            if self._repair == "o_proj":
                ridge = self._ridge(merged, targets, weight_T, heads)
                merged = _with_output(merged, ridge.w_CN)
                run.load(write_layer(merged, target_layer))
            for i, hidden in enumerate(x_converted):
                x_converted[i], _ = run.forward(hidden, kwargs[i], heads_BTN=heads[i])
        report = LayerReport(
            index=layer.index,
            groups=groups,
            keys=cost.keys if fit is None else fit.lost,
            keys_fitted=None if fit is None else fit.accepted,
            values=cost.values,
            repair=None if ridge is None else ridge.accepted,
            held_out_before=None if ridge is None else ridge.held_out_before,
            held_out_after=None if ridge is None else ridge.held_out_after,
        )
        return write_layer(merged, target_layer), report

    def _moments(
        self,
        original: LayerRun,
        weights: LayerWeights,
        layer: LayerAttention,
        x_converted: list[Tensor],
        kwargs: list[dict[str, Any]],
    ) -> LayerMoments:
        sums = MomentSums(layer.kv_heads, rotary_indices(layer.rope, layer.head_dim))
        for hidden, named in zip(x_converted, kwargs, strict=True):
            a_TC = original.attention_input(hidden, named).flatten(0, 1)
            v_TKD = project(a_TC, weights.v_KDC, weights.v_bias_KD)
            sums.add(*queries_and_keys(a_TC, weights, layer), v_TKD)
        return sums.finish(layer.index)

    def _inputs(
        self, original: LayerRun, x_converted: list[Tensor], kwargs: list[dict[str, Any]]
    ) -> Iterator[tuple[bool, Tensor]]:
        """What the projections read, batch by batch; about a quarter of each kind of text is held out."""
        kinds = [kind for kind, _ in self._batches]
        for i, kind in enumerate(kinds):
            place, period = kinds[:i].count(kind), min(4, kinds.count(kind))
            yield place % period == period - 1, original.attention_input(x_converted[i], kwargs[i]).flatten(0, 1)

    def _merge(
        self, moments: LayerMoments, weights: LayerWeights, layer: LayerAttention
    ) -> tuple[HeadMaps, MergeCost, Groups]:
        calibrate_keys = layer.qk_norm is None or _fits_keys(layer, self._method)
        cost = group_cost(moments, weights, layer.rope, keys=calibrate_keys)
        groups = best_groups(layer.kv_heads, self._kv_heads, cost)
        maps, lost = calibrated_maps(moments, weights, groups, layer.rope, method=self._method, keys=calibrate_keys)
        return maps, lost, groups

    def _ridge(self, merged: LayerWeights, targets: list[Tensor], weight_T: list[Tensor], heads: list[Tensor]) -> Ridge:
        folds: dict[tuple[str, int], RidgeSums] = {}
        for i, fold in enumerate(self._folds):
            z_TN = heads[i].flatten(0, 1)
            if merged.o_bias_C is not None:
                z_TN = torch.cat([z_TN, torch.ones_like(z_TN[:, :1])], 1)
            sums = RidgeSums.of(z_TN, targets[i].flatten(0, 1), weight_T[i])
            folds[fold] = folds[fold] + sums if fold in folds else sums
        start = merged.o_CHD.flatten(1, 2)
        if merged.o_bias_C is not None:
            start = torch.cat([start, merged.o_bias_C[:, None]], 1)
        return refit(folds, start.double())


def _fits_keys(layer: LayerAttention, method: MergeMethod) -> bool:
    """Whether a layer's keys are fitted through their norm; merges for comparison know nothing of that."""
    return can_fit(layer) and method is CALIBRATED


def _with_output(weights: LayerWeights, w_CN: Tensor) -> LayerWeights:
    """Weights with a refitted output projection; a last column beyond the heads is the bias."""
    heads, head_dim = weights.o_CHD.shape[1:]
    n = heads * head_dim
    bias = weights.o_bias_C if weights.o_bias_C is None else w_CN[:, n].float()
    return replace(weights, o_CHD=w_CN[:, :n].reshape(-1, heads, head_dim).float(), o_bias_C=bias)


def _plain_residual(spec: AttentionSpec) -> bool:
    """Whether the output projection's result is added to the residual stream as it is."""
    return spec.family not in _NORM_OR_SCALE_AFTER_ATTENTION
