"""A longer window by rewriting the position encoding: linear, ntk, yarn, llama3.

`extend` gives the configuration, `extend_fields` the same for a `config.json` dict, `write_extended` a folder. Written
is what stock transformers 5 reads (`rope_parameters`) and, with the same values, the older names (`rope_theta`,
`rope_scaling`) that other engines and older releases look for. The original length and theta are always explicit.

An already extended model is extended further with the method it has, from its true original length; another method on
top of it is refused, because its weights were trained with the first.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.context import frequencies as spectra
from retrofit.context.fields import RopeView, as_dict, original_length, rotary_dim, text_part, views
from retrofit.context.frequencies import frequencies
from retrofit.context.lint import Finding, lint, lint_folder, require_clean
from retrofit.context.names import length_dependent, portable, replaced, rotary_fields
from retrofit.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "METHODS",
    "Extension",
    "Finding",
    "extend",
    "extend_fields",
    "frequencies",
    "length_dependent",
    "lint",
    "lint_folder",
    "plan",
    "portable",
    "write_extended",
]

METHODS = ("linear", "ntk", "yarn", "llama3")
LONGROPE_ONLY = ("phi3",)
"""Families whose configuration class knows no other rope_type than default and longrope."""
HEAD_DIM_NEEDED = ("mixtral",)
"""Families whose class leaves head_dim empty and whose scaled encodings fail on that."""


@dataclass(frozen=True)
class Extension:
    """What an extension does. Lengths in tokens; factor is from the true original length, step from the window before.

    notes: what a person should know, for the report and the card.
    """

    method: str
    original: int
    before: int
    length: int
    factor: float
    step: float
    notes: tuple[str, ...] = ()


def extend(
    config: PretrainedConfig, *, length: int | None = None, factor: float | None = None, method: str
) -> PretrainedConfig:
    """A copy of `config` whose window is `length` tokens, or `factor` times its present window (exactly one of them).

    Only full-attention layers are extended where layers have their own parameters (Gemma 3); layers without rotary
    encoding (SmolLM3) have nothing to extend. Raises UserError: unknown method, length not above the present window, a
    factor that gives no whole number of tokens, an encoding this method cannot be put on.
    """
    result = copy.deepcopy(config)
    text = result.get_text_config()
    fields, _ = _extended(as_dict(text), length=length, factor=factor, method=method)
    for name in ("max_position_embeddings", "original_max_position_embeddings", "rope_parameters", "head_dim"):
        if name in fields:
            setattr(text, name, fields[name])
    if hasattr(text, "rope_theta"):
        text.rope_theta = fields["rope_theta"]
    text.validate_rope()
    return result


def plan(config: object, *, length: int | None = None, factor: float | None = None, method: str) -> Extension:
    """What `extend` would do, without doing it; raises the same errors. Needs no torch."""
    _, text = text_part(as_dict(config))
    return _extended(text, length=length, factor=factor, method=method)[1]


def extend_fields(
    raw: Mapping[str, Any], *, length: int | None = None, factor: float | None = None, method: str
) -> dict[str, Any]:
    """`config.json` with a longer window: the rotary fields are replaced, new and old names; all others stay."""
    prefix, text = text_part(raw)
    fields, _ = _extended(text, length=length, factor=factor, method=method)
    return replaced(raw, prefix, fields)


def write_extended(
    source_folder: str | Path,
    out: str | Path,
    *,
    length: int | None = None,
    factor: float | None = None,
    method: str,
    overwrite: bool = False,
) -> Extension:
    """Write a checkpoint folder with a longer window: weights as hard links (copies across disks), a new config.json.

    The tokenizer's `model_max_length` is raised to the new window. The new configuration is linted before anything is
    written; an error in it is a UserError.
    """
    from retrofit.checkpoint.place import link_or_copy
    from retrofit.checkpoint.read import Checkpoint
    from retrofit.checkpoint.write import copy_side_files, staged, write_config

    source, out = Path(source_folder), Path(out)
    checkpoint = Checkpoint.open(source)
    extension = plan(checkpoint.config, length=length, factor=factor, method=method)
    fields = extend_fields(checkpoint.config, length=length, factor=factor, method=method)
    require_clean(lint(fields), str(out))
    with staged(out, overwrite=overwrite) as folder:
        for path in sorted(source.glob("model*.safetensors*")):
            link_or_copy(path, folder / path.name)
        copy_side_files(source, folder)
        _raise_tokenizer_length(folder / "tokenizer_config.json", extension.length)
        write_config(folder, fields)
    return extension


def _raise_tokenizer_length(path: Path, length: int) -> None:
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    limit = settings.get("model_max_length")
    if isinstance(limit, (int, float)) and limit < length:
        settings["model_max_length"] = length
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _extended(
    text: Mapping[str, Any], *, length: int | None, factor: float | None, method: str
) -> tuple[dict[str, Any], Extension]:
    """(the rotary fields of the extended configuration under all names, what was done)."""
    if method not in METHODS:
        raise UserError(
            f"Unknown context method `{method}`", where="context.method", fix=f"use one of: {', '.join(METHODS)}"
        )
    before = text.get("max_position_embeddings", text.get("n_positions"))
    if not isinstance(before, int) or isinstance(before, bool) or before < 1:
        raise UserError(
            f"The model's window is not a whole number of tokens: {before!r}",
            where="config.json: max_position_embeddings",
            fix="write the number of tokens the model was trained with",
        )
    length = _target(before, length, factor)
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
    extension = Extension(method, original, before, length, used * step, step, _notes(text, found, method, used, step))
    new = RopeView(view.where, view.layer_type, _parameters(text, view, extension))
    merged = tuple(new if one is view else one for one in found)
    fields = rotary_fields(text, merged, length, original)
    if text.get("model_type") in HEAD_DIM_NEEDED and text.get("head_dim") is None:
        fields["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return fields, extension


def _target(before: int, length: int | None, factor: float | None) -> int:
    if (length is None) == (factor is None):
        raise UserError("Give exactly one of `length` and `factor`", where="context", fix="for example `length: 16384`")
    if length is None:
        exact = before * float(factor)  # type: ignore[arg-type]
        length = round(exact)
        if abs(exact - length) > 1e-6:
            raise UserError(
                f"{factor:g} x {before} tokens is {exact:g}, not a whole number",
                where="context.factor",
                fix=f"write `length: {length}` instead",
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
    elif kind in ("linear", "yarn", "llama3"):
        present, used = kind, float(view.parameters.get("factor") or before / (known or before))
    else:
        present, used = kind, 1.0
    if present != method:
        fix = f"use `method: {present}`" if present in METHODS else "start from a checkpoint with plain RoPE"
        raise UserError(
            f"The model's window is already extended by `{present}`; `{method}` on top would undo that",
            where=f"config.json: {view.where}",
            fix=f"{fix}, or start from the checkpoint before that extension",
        )
    if known is None and kind in ("yarn", "llama3"):
        raise UserError(
            f"The model is extended by `{kind}` but its original length is not recorded",
            where=f"config.json: {view.where}.original_max_position_embeddings",
            fix="write the window it had before that extension there",
        )
    return (round(before / used) if known is None else known), used


def _parameters(text: Mapping[str, Any], view: RopeView, extension: Extension) -> dict[str, Any]:
    """The rotary parameters of one set of layers after the extension."""
    got = view.parameters
    theta = got.get("rope_theta")
    if theta is None:
        raise UserError(
            "The configuration does not say its rope_theta",
            where=f"config.json: {view.where}",
            fix="write the theta the model was trained with into rope_parameters",
        )
    dim = rotary_dim(text, got)
    method, factor, original = extension.method, extension.factor, extension.original
    partial = (
        {} if got.get("partial_rotary_factor") is None else {"partial_rotary_factor": got["partial_rotary_factor"]}
    )
    common = {"rope_theta": float(theta), **partial}
    if method == "ntk":
        if dim <= 2:
            raise UserError("ntk needs more than one rotary pair", where=f"rotary dim {dim}", fix="use another method")
        return {**common, "rope_type": "default", "rope_theta": spectra.ntk_theta(float(theta), dim, extension.step)}
    scaled: dict[str, Any] = {**common, "rope_type": method, "factor": factor}
    if method in ("yarn", "llama3"):
        scaled["original_max_position_embeddings"] = original
    if method == "llama3":
        scaled["low_freq_factor"] = float(got.get("low_freq_factor", 1.0))
        scaled["high_freq_factor"] = float(got.get("high_freq_factor", 4.0))
    if method == "yarn":
        keep = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        scaled |= {key: got[key] for key in keep if got.get(key) is not None}
    if text.get("model_type") in LONGROPE_ONLY:
        return _as_longrope(text, view, scaled, original, common)
    return scaled


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


def _notes(
    text: Mapping[str, Any], found: tuple[RopeView, ...], method: str, used: float, step: float
) -> tuple[str, ...]:
    notes = []
    if used != 1:
        notes.append(
            f"The model was already extended by {method} x {used:g}; composed with x {step:g} from its original length."
        )
    if len(found) > 1:
        notes.append("Sliding-window layers keep their own encoding; only full-attention layers are extended.")
    elif text.get("sliding_window") and text.get("use_sliding_window", True):
        notes.append(
            f"Layers with a sliding window of {text['sliding_window']} tokens share the extended encoding: this "
            "configuration holds one set of rotary parameters for all layers."
        )
    if method == "linear":
        notes.append(
            "vLLM multiplies max_position_embeddings by the linear factor once more: start it with --max-model-len."
        )
    if text.get("model_type") in LONGROPE_ONLY and method != "ntk":
        notes.append(
            f"phi3 reads only longrope: {method} is written as longrope with equal lists. vLLM and llama.cpp compute "
            "their own attention factor for it; `ntk` is read alike everywhere."
        )
    return tuple(notes)
