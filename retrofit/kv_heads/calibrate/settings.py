"""What a calibrated conversion is asked to do, what of it a model allows, and what its text is too short for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.data.calibration import AVERAGED_TOKENS, CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.merge.joint import CALIBRATED, MergeMethod
from retrofit.kv_heads.merge.qk_norm import can_fit
from retrofit.kv_heads.repair.outcome import LayerReport
from retrofit.kv_heads.repair.repairs import Repair
from retrofit.model.spec import AttentionSpec, LayerAttention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENS_PER_COLUMN = 50  # a fit with fewer learns its calibration text


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


def notes_on(spec: AttentionSpec, settings: Settings, text: CalibrationText) -> list[str]:
    """What calibration cannot do on this model or with this text."""
    notes = []
    if any(layer.qk_norm and not fits_keys(layer, settings.method) for layer in spec.layers):
        notes.append(
            "keys are mean-pooled: the norm on queries and keys takes the magnitudes that this merge of keys needs; "
            "values and output projection are merged as asked"
        )
    if settings.repairs and spec.residual_scale is None:
        notes.append(
            f"{spec.family} normalises the attention output: the repair restores each layer's own output, and not the "
            "error of the layers before"
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
