"""What each method of a longer window changes in a configuration, and what it can be put on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retrofit.checkpoint.config import is_whole
from retrofit.context import frequencies as spectra
from retrofit.context import learned
from retrofit.context.extension import Extension, with_attention_factor, with_written_factor, written_factor
from retrofit.context.fields import LAYER_THETAS, RopeView, head_dim, require_numbers, rotary_dim, views
from retrofit.context.history import history, total_factor, trained_with_llama3
from retrofit.context.longrope import as_longrope, folds, lists
from retrofit.context.names import replaced, rotary_fields
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.schema import MOST_TOKENS, ROPE_SETTINGS, RopeSettings

METHODS = tuple(ROPE_SETTINGS)
HEAD_DIM_NEEDED = ("mixtral",)
"""Families whose class leaves head_dim empty and whose scaled encodings fail on that."""


def extended(
    text: Mapping[str, Any],
    *,
    length: int | None,
    factor: float | None,
    method: str,
    settings: RopeSettings,
    held: float = 1.0,
) -> tuple[dict[str, Any], Extension]:
    """(the position fields of the extended configuration under all names, what was done).

    held: what the queries are multiplied with already, by the attention factors of earlier extensions.
    """
    _require_method(method, settings)
    before = text.get("max_position_embeddings", text.get("n_positions"))
    if not is_whole(before) or not 1 <= before <= MOST_TOKENS:
        raise UserError(
            f"The model's context length is not a whole number of tokens: {shown(repr(before), 60)}",
            where="config.json: max_position_embeddings",
            fix="write the number of tokens the model was trained with",
        )
    length = _target(before, length, factor)
    if learned.has_table(text):
        learned.require_interpolation(method, settings)
        step = length / before
        return learned.fields(text, length), Extension(
            method, before, before, length, step, step, (learned.note(before, length),)
        )
    found = views(text)
    chosen = [view for view in found if view.layer_type in (None, "full_attention")]
    if not chosen:
        raise UserError(
            "The model has no rotary position encoding on full-attention layers to extend",
            where="config.json: rope_parameters",
            fix="leave `context` out of the recipe",
        )
    view = chosen[0]
    if view.where == LAYER_THETAS:
        _require_theta_alone(found, chosen, method)
    require_numbers(view)
    if not rotary_dim(text, view.parameters):
        raise UserError(
            "config.json does not say in numbers how wide a head is",
            where="config.json: hidden_size, num_attention_heads",
            fix="download the file again",
        )
    original, used = history(text, view, before, method, held)
    step = length / before
    scale = total_factor(text, view, method, before, length, used)
    trained = trained_with_llama3(text, view)
    notes = _notes(text, found, method, 1.0 if trained else used, scale, step, settings)
    if trained:
        extension = Extension(method, before, before, length, step, step, notes)
    else:
        extension = Extension(method, original, before, length, scale, step, notes)
    new = RopeView(view.where, view.layer_type, _parameters(text, view, extension, settings, original, scale))
    wanted = settings.attention_factor
    if folds(text.get("model_type"), method):
        new, own = as_longrope(text, new)
        wanted = own if wanted is None else wanted
    merged = tuple(new if one is view else one for one in found)
    # `none` claims the length for the model itself: nothing was extended, so there is no other original length.
    fields = rotary_fields(text, merged, length, None if method == "none" or trained else original)
    extension = with_written_factor(text, view, extension, settings)
    extension = with_attention_factor(replaced(text, "", fields), view.layer_type, extension, wanted, held)
    if text.get("model_type") in HEAD_DIM_NEEDED and text.get("head_dim") is None:
        fields["head_dim"] = head_dim(text)
    return fields, extension


def _require_theta_alone(found: tuple[RopeView, ...], chosen: list[RopeView], method: str) -> None:
    """UserError unless the method can be put on full-attention layers alone, where layers differ by their base only."""
    if len(chosen) > 1:
        raise UserError(
            f"The full-attention layers have {len(chosen)} different RoPE bases",
            where=f"config.json: {LAYER_THETAS}",
            fix="start from a checkpoint whose full-attention layers share one base",
        )
    if len(found) > 1 and method not in ("ntk", "none"):
        raise UserError(
            f"`{method}` would change the sliding-window layers too: this architecture has a RoPE base for each layer, "
            "and one scaling for all of them",
            where="context.method",
            fix="use `method: ntk`, which raises the base of full-attention layers, or `method: search`",
        )


def _require_method(method: str, settings: RopeSettings) -> None:
    if method not in METHODS:
        raise UserError(
            f"Unknown context method `{method}`", where="context.method", fix=f"use one of: {', '.join(METHODS)}"
        )
    unread = settings.unread_by(method)
    if unread:
        raise UserError(f"`{method}` does not read `{unread[0]}`", where=f"context.{unread[0]}", fix="leave it out")
    if method == "longrope" and (settings.short_factor is None or settings.long_factor is None):
        raise UserError(
            "`longrope` needs `short_factor` and `long_factor`",
            where="context",
            fix="write both lists, a number per rotary pair each, into the `context` section of a recipe",
        )


def _target(before: int, length: int | None, factor: float | None) -> int:
    if (length is None) == (factor is None):
        raise UserError("Give exactly one of `length` and `factor`", where="context", fix="for example `length: 16384`")
    given = "context.length" if factor is None else "context.factor"
    if length is None:
        exact = before * float(factor)  # type: ignore[arg-type]
        length = round(exact) if exact <= MOST_TOKENS else MOST_TOKENS + 1  # infinity, and what is no number, as well
        if length <= MOST_TOKENS and abs(exact - length) > 1e-6:
            raise UserError(
                f"{factor:g} x {before} tokens is {exact:g}, not a whole number",
                where="context.factor",
                fix=f"write `length: {length}` instead",
            )
    if length > MOST_TOKENS:
        raise UserError(
            f"A window of more than {MOST_TOKENS} tokens: engines count positions in 32 bits",
            where=given,
            fix="ask for fewer tokens",
        )
    if length <= before:
        raise UserError(
            f"The model already has a window of {before} tokens; {length} is not longer",
            where=given,
            fix=f"ask for more than {before} tokens",
        )
    return length


def _parameters(
    text: Mapping[str, Any],
    view: RopeView,
    extension: Extension,
    settings: RopeSettings,
    original: int,
    scale: float,
) -> dict[str, Any]:
    """The rotary parameters of one set of layers after the extension. original, scale: as the encoding counts them."""
    got, method = view.parameters, extension.method
    theta = got.get("rope_theta")
    if theta is None:
        raise UserError(
            "The configuration does not say its rope_theta",
            where=f"config.json: {view.where}",
            fix="write the theta the model was trained with into rope_parameters",
        )
    dim = rotary_dim(text, got)
    partial = (
        {} if got.get("partial_rotary_factor") is None else {"partial_rotary_factor": got["partial_rotary_factor"]}
    )
    common = {"rope_theta": float(settings.theta or theta), **partial}
    if method == "none":
        return {**common, "rope_type": "default"}
    if method == "ntk":
        if dim <= 2:
            raise UserError("ntk needs more than one rotary pair", where=f"rotary dim {dim}", fix="use another method")
        larger = settings.theta or spectra.ntk_theta(float(theta), dim, extension.step)
        return {**common, "rope_type": "default", "rope_theta": larger}
    scaled: dict[str, Any] = {**common, "rope_type": method, "factor": settings.scale or scale}
    if method != "linear":
        scaled["original_max_position_embeddings"] = original
    if method == "llama3":
        scaled["low_freq_factor"] = float(settings.low_freq_factor or got.get("low_freq_factor", 1.0))
        scaled["high_freq_factor"] = float(settings.high_freq_factor or got.get("high_freq_factor", 4.0))
        _require_ramp("low_freq_factor", scaled["low_freq_factor"], "high_freq_factor", scaled["high_freq_factor"])
    if method == "yarn":
        keep = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        scaled |= {key: got[key] for key in keep if got.get(key) is not None}
        given = ("beta_fast", "beta_slow")
        scaled |= {key: getattr(settings, key) for key in given if getattr(settings, key) is not None}
        _require_ramp("beta_slow", scaled.get("beta_slow", 1.0), "beta_fast", scaled.get("beta_fast", 32.0))
        written = written_factor(text, view) if view.rope_type == "yarn" else None
        if written is not None and settings.attention_factor is None:
            scaled["attention_factor"] = written
    if method == "longrope":
        return scaled | lists(settings, dim // 2)
    return scaled


def _require_ramp(low: str, least: float, high: str, most: float) -> None:
    """UserError unless there is something between the frequencies that are scaled and those that are kept."""
    if not least < most:
        raise UserError(
            f"`{high}` ({most:g}) must be greater than `{low}` ({least:g})",
            where=f"context.{high}",
            fix="leave both out for the method's own, or raise the one or lower the other",
        )


def _notes(
    text: Mapping[str, Any],
    found: tuple[RopeView, ...],
    method: str,
    used: float,
    total: float,
    step: float,
    settings: RopeSettings,
) -> tuple[str, ...]:
    notes = []
    if used != 1 and method not in ("none", "longrope"):
        note = f"The model was already extended by {method} x {used:g}; "
        composed = math.isclose(total, used * step)
        notes.append(
            note + (f"composed with x {step:g} from its original length." if composed else f"it is x {total:g} now.")
        )
    if len(found) > 1:
        notes.append("Sliding-window layers keep their own encoding; only full-attention layers are extended.")
    elif text.get("sliding_window") and text.get("use_sliding_window", True):
        notes.append(
            f"Layers with a sliding window of {text['sliding_window']} tokens share the extended encoding: this "
            "configuration holds one set of rotary parameters for all layers."
        )
    if method == "none":
        notes.append("Only the length is written: the encoding stays as it is, whether it reaches that far or not.")
    folded = folds(text.get("model_type"), method)
    if method == "linear" and not folded:
        notes.append(
            "vLLM multiplies max_position_embeddings by the linear factor once more: start it with --max-model-len."
        )
    if method == "longrope" and settings.short_factor != settings.long_factor:
        notes.append(
            "Up to the original length the short factors hold, beyond it the long ones: the encoding of a prefix "
            "changes with the total length, so each length is measured in a pass of its own. vLLM starts with the "
            "original length and the short factors: give it --max-model-len."
        )
    if folded:
        notes.append(
            f"phi3 reads only longrope: {method} is written as longrope with equal lists, and the queries hold what "
            "its attention factor differs from longrope's. vLLM starts with the original length: give it "
            "--max-model-len, or use `ntk`, which needs neither."
        )
    return tuple(notes)
