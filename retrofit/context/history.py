"""What an earlier extension left in a configuration, and what may be put on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrofit.context.fields import RopeView, original_length, trained_length
from retrofit.context.longrope import written_as_longrope
from retrofit.errors import UserError
from retrofit.recipe.schema import ROPE_SETTINGS


def history(text: Mapping[str, Any], view: RopeView, before: int, method: str, held: float = 1.0) -> tuple[int, float]:
    """(true original length, factor already applied) of the encoding that is there; refuses what cannot compose.

    held: what earlier extensions multiplied the queries with.
    """
    kind, known = view.rope_type, original_length(text, view.parameters)
    if kind == "default":
        if known is None or known >= before:
            return before, 1.0
        present, used = "ntk", before / known
        if method == "none":  # a longer claim for the same base
            present = "none"
    elif kind in ("linear", "yarn", "llama3"):
        present, used = kind, float(view.parameters.get("factor") or before / (known or before))
    elif method != "longrope" and known is not None and (found := written_as_longrope(text, view, known, held)):
        present, used = found
    elif kind == "longrope":  # its lists are absolute: they stand in the place of those that are there
        present, used = kind, before / (known or before)
    else:
        present, used = kind, 1.0
    if present != method:
        fix = f"use `method: {present}`" if present in ROPE_SETTINGS else "start from a checkpoint with plain RoPE"
        if present == "longrope":
            fix += " with both lists"
        raise UserError(
            f"The model's context is already extended by `{present}`; `{method}` on top would undo that",
            where=f"config.json: {view.where}",
            fix=f"{fix}, or start from the checkpoint before that extension",
        )
    if known is None and kind in ("yarn", "llama3", "longrope"):
        raise UserError(
            f"The model is extended by `{kind}` but its original length is not recorded",
            where=f"config.json: {view.where}.original_max_position_embeddings",
            fix="write the context length it had before that extension there",
        )
    return (round(before / used) if known is None else known), used


def trained_with_llama3(text: Mapping[str, Any], view: RopeView) -> bool:
    """Whether llama3 is the encoding that the model was trained with, as Llama 3.1: its file has the original length
    inside the rotary parameters alone, that of an extension at the top as well."""
    return view.rope_type == "llama3" and text.get("original_max_position_embeddings") is None


def total_factor(text: Mapping[str, Any], view: RopeView, method: str, before: int, length: int, used: float) -> float:
    """The factor of the new window, whatever scale the file paired with the old one.

    A scale that reaches further already stays: the weights may have been trained with it. Not where the window was
    never raised to it, as Qwen's instructions have it: those weights know the original length alone.
    """
    known = original_length(text, view.parameters)
    if known is None or view.rope_type == "default" or method not in ("linear", "yarn"):
        return used * length / before  # of llama3 the window may be longer than original x factor, as Llama 3.1's is
    return max(length / known, used if trained_length(text, before) > known else 1.0)
