"""What each method of a longer window changes in a configuration, and what it can be put on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrofit.context import frequencies as spectra
from retrofit.context import learned
from retrofit.context.fields import RopeView, original_length, rotary_dim, views
from retrofit.context.names import rotary_fields
from retrofit.errors import UserError
from retrofit.recipe.schema import MOST_TOKENS, ROPE_SETTINGS, RopeSettings

METHODS = tuple(ROPE_SETTINGS)
LONGROPE_ONLY = ("phi3",)
"""Families whose configuration class knows no other rope_type than default and longrope."""
HEAD_DIM_NEEDED = ("mixtral",)
"""Families whose class leaves head_dim empty and whose scaled encodings fail on that."""


@dataclass(frozen=True)
class Extension:
    """What an extension does. Lengths in tokens; factor is from the true original length, step from the window before.

    notes: what a person should know, for the report and the card. query_scale: what the weights that make the rotated
    dims of the queries are multiplied with, so that an attention factor other than the encoding's own holds.
    """

    method: str
    original: int
    before: int
    length: int
    factor: float
    step: float
    notes: tuple[str, ...] = ()
    query_scale: float = 1.0


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
    if not isinstance(before, int) or isinstance(before, bool) or before < 1:
        raise UserError(
            f"The model's window is not a whole number of tokens: {before!r}",
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
    original, used = _history(text, view, before, method)
    step = length / before
    scale = _total(text, view, method, before, length, used)
    trained = _trained_with_llama3(text, view)
    notes = _notes(text, found, method, 1.0 if trained else used, scale, step, settings)
    if trained:
        extension = Extension(method, before, before, length, step, step, notes)
    else:
        extension = Extension(method, original, before, length, scale, step, notes)
    new = RopeView(view.where, view.layer_type, _parameters(text, view, extension, settings, original, scale))
    extension = _with_written_factor(text, view, extension, settings)
    extension = _with_attention_factor(text, new, extension, settings.attention_factor, held)
    merged = tuple(new if one is view else one for one in found)
    # `none` claims the length for the model itself: nothing was extended, so there is no other original length.
    fields = rotary_fields(text, merged, length, None if method == "none" or trained else original)
    if text.get("model_type") in HEAD_DIM_NEEDED and text.get("head_dim") is None:
        fields["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return fields, extension


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
            where="context",
            fix="ask for fewer tokens",
        )
    if length <= before:
        raise UserError(
            f"The model already has a window of {before} tokens; {length} is not longer",
            where="context",
            fix=f"ask for more than {before} tokens, or leave `context` out of the recipe",
        )
    return length


def _history(text: Mapping[str, Any], view: RopeView, before: int, method: str) -> tuple[int, float]:
    """(true original length, factor already applied) of the encoding that is there; refuses what cannot compose."""
    kind, known = view.rope_type, original_length(text, view.parameters)
    if kind == "default":
        if known is None or known >= before:
            return before, 1.0
        present, used = "ntk", before / known
        if method == "none":  # a longer claim for the same base
            present = "none"
    elif kind in ("linear", "yarn", "llama3"):
        present, used = kind, float(view.parameters.get("factor") or before / (known or before))
    elif method != "longrope" and known is not None and (found := _written_as_longrope(text, view, known)):
        present, used = found, float(view.parameters["factor"])
    elif kind == "longrope":  # its lists are absolute: they stand in the place of those that are there
        present, used = kind, before / (known or before)
    else:
        present, used = kind, 1.0
    if present != method:
        fix = f"use `method: {present}`" if present in METHODS else "start from a checkpoint with plain RoPE"
        if present == "longrope":
            fix += " with both lists"
        raise UserError(
            f"The model's window is already extended by `{present}`; `{method}` on top would undo that",
            where=f"config.json: {view.where}",
            fix=f"{fix}, or start from the checkpoint before that extension",
        )
    if known is None and kind in ("yarn", "llama3", "longrope"):
        raise UserError(
            f"The model is extended by `{kind}` but its original length is not recorded",
            where=f"config.json: {view.where}.original_max_position_embeddings",
            fix="write the window it had before that extension there",
        )
    return (round(before / used) if known is None else known), used


def _trained_with_llama3(text: Mapping[str, Any], view: RopeView) -> bool:
    """Whether llama3 is the encoding that the model was trained with, as Llama 3.1: its file has the original length
    inside the rotary parameters alone, that of an extension at the top as well."""
    return view.rope_type == "llama3" and text.get("original_max_position_embeddings") is None


def _total(text: Mapping[str, Any], view: RopeView, method: str, before: int, length: int, used: float) -> float:
    """The factor of the new window, whatever scale the file paired with the old one.

    A scale that reaches further already stays: the weights may have been trained with it. Not where the window was
    never raised to it, as Qwen's instructions have it: those weights know the original length alone.
    """
    known = original_length(text, view.parameters)
    if known is None or view.rope_type == "default" or method not in ("linear", "yarn"):
        return used * length / before  # of llama3 the window may be longer than original x factor, as Llama 3.1's is
    return max(length / known, used if before > known else 1.0)


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
    if method == "yarn":
        keep = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        scaled |= {key: got[key] for key in keep if got.get(key) is not None}
        given = ("beta_fast", "beta_slow")
        scaled |= {key: getattr(settings, key) for key in given if getattr(settings, key) is not None}
        written = _written_factor(text, view) if view.rope_type == "yarn" else None
        if written is not None and settings.attention_factor is None:
            scaled["attention_factor"] = written
    if method == "longrope":
        return scaled | _lists(settings, dim // 2)
    if text.get("model_type") in LONGROPE_ONLY:
        return _as_longrope(text, view, scaled, original, common)
    return scaled


def _lists(settings: RopeSettings, pairs: int) -> dict[str, Any]:
    """The factors of LongRoPE (arXiv 2402.13753): divisors of the frequencies, one per rotary pair."""
    found: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        values = list(getattr(settings, name))
        if len(values) != pairs:
            raise UserError(
                f"`{name}` has {len(values)} numbers, the model {pairs} rotary pairs",
                where=f"context.{name}",
                fix=f"write {pairs} numbers, that of the fastest pair first",
            )
        found[name] = values
    return found


def _written_factor(text: Mapping[str, Any], view: RopeView) -> float | None:
    """The attention factor that the configuration writes out, where it is not the one its encoding has by itself."""
    written = view.parameters.get("attention_factor")
    if written is None:
        return None
    bare = {key: value for key, value in view.parameters.items() if key != "attention_factor"}
    _, own = spectra.compute(text, RopeView(view.where, view.layer_type, bare))
    return None if math.isclose(written, own, rel_tol=1e-6) else float(written)


def _with_written_factor(
    text: Mapping[str, Any], view: RopeView, extension: Extension, settings: RopeSettings
) -> Extension:
    """The extension with a note on what becomes of an attention factor that the configuration writes out."""
    if extension.method != view.rope_type or settings.attention_factor is not None:
        return extension
    written = _written_factor(text, view)
    if written is None:
        return extension
    said = f"The configuration writes the attention factor {written:g} out: "
    kept = "it is kept. vLLM and llama.cpp compute the encoding's own; to change it in all, give `attention_factor`."
    note = said + (kept if extension.method == "yarn" else "it went with the lists that the new ones stand in for.")
    return replace(extension, notes=(*extension.notes, note))


def _with_attention_factor(
    text: Mapping[str, Any], view: RopeView, extension: Extension, wanted: float | None, held: float
) -> Extension:
    """The extension with what the queries must be multiplied with to get the wanted factor, None for the encoding's.

    held: what they are multiplied with already, which is divided out.
    """
    if extension.method == "none" or (wanted is None and held == 1):
        return extension
    if text.get("clip_qkv") is not None:
        raise UserError(
            "The model clamps its queries after the projection, so their weights cannot hold an attention factor",
            where="context.attention_factor",
            fix="leave it out",
        )
    _, own = spectra.compute(text, view, extension.length)
    scale, notes = 1.0, list(extension.notes)
    if held != 1:
        notes.append(f"An earlier extension's attention factor is divided out of the queries, which held x {held:.4g}.")
    if wanted is not None:
        scale = (wanted / own) ** 2
        notes.append(
            f"Attention factor {wanted:g} instead of {own:.4g}: the weights that make the queries hold it "
            f"(x {scale:.4g}), because engines compute the encoding's own whatever the configuration says."
        )
    return replace(extension, query_scale=scale / held, notes=tuple(notes))


def _as_longrope(
    text: Mapping[str, Any], view: RopeView, scaled: dict[str, Any], original: int, common: dict[str, Any]
) -> dict[str, Any]:
    """The same spectrum as longrope with equal lists and an explicit attention factor: exact and length-independent."""
    wanted, scale = spectra.compute(text, RopeView(view.where, view.layer_type, scaled))
    stretch = (spectra.base_frequencies(common["rope_theta"], 2 * len(wanted)) / wanted).tolist()
    return {
        **common,
        "rope_type": "longrope",
        "factor": scaled["factor"],
        "short_factor": stretch,
        "long_factor": list(stretch),
        "attention_factor": scale,
        "original_max_position_embeddings": original,
    }


def _written_as_longrope(text: Mapping[str, Any], view: RopeView, original: int) -> str | None:
    """The method whose defaults `_as_longrope` wrote as these lists; None for any other lists."""
    got = view.parameters
    if view.rope_type != "longrope" or text.get("model_type") not in LONGROPE_ONLY or got.get("factor") is None:
        return None
    if got.get("short_factor") != got.get("long_factor"):
        return None
    spectrum, scale = spectra.compute(text, view)
    common = {key: got[key] for key in ("rope_theta", "partial_rotary_factor", "factor") if key in got}
    for method in ("yarn", "linear", "llama3"):
        ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if method == "llama3" else {}
        asked = {**common, **ramp, "rope_type": method, "original_max_position_embeddings": original}
        wanted, own = spectra.compute(text, RopeView(view.where, view.layer_type, asked))
        if math.isclose(scale, own, rel_tol=1e-6) and np.allclose(spectrum, wanted, rtol=1e-6, atol=0.0):
            return method
    return None


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
        told = f"The model was already extended by {method} x {used:g}; "
        composed = math.isclose(total, used * step)
        notes.append(
            told + (f"composed with x {step:g} from its original length." if composed else f"it is x {total:g} now.")
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
    if method == "linear":
        notes.append(
            "vLLM multiplies max_position_embeddings by the linear factor once more: start it with --max-model-len."
        )
    if method == "longrope" and settings.short_factor != settings.long_factor:
        notes.append(
            "Up to the original length the short factors hold, beyond it the long ones: the encoding of a prefix "
            "changes with the total length, so each length is measured in a pass of its own."
        )
    if text.get("model_type") in LONGROPE_ONLY and method not in ("ntk", "none", "longrope"):
        notes.append(
            f"phi3 reads only longrope: {method} is written as longrope with equal lists. vLLM and llama.cpp compute "
            "their own attention factor for it; `ntk` is read alike everywhere."
        )
    return tuple(notes)
