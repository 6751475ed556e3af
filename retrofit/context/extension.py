"""What an extension does, and what the queries must hold of the attention factor it is to have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from retrofit.context import frequencies as spectra
from retrofit.context.fields import RopeView
from retrofit.context.search.outcome import SearchResult
from retrofit.errors import UserError
from retrofit.recipe.schema import RopeSettings


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


@dataclass(frozen=True)
class ExtendReport(Extension):
    """What was done, and how the encoding was searched for; None where it was named."""

    search: SearchResult | None = None


def written_factor(text: Mapping[str, Any], view: RopeView) -> float | None:
    """The attention factor that the configuration writes out, where it is not the one its encoding has by itself."""
    written = view.parameters.get("attention_factor")
    if written is None:
        return None
    bare = {key: value for key, value in view.parameters.items() if key != "attention_factor"}
    _, own = spectra.compute(text, RopeView(view.where, view.layer_type, bare))
    return None if math.isclose(written, own, rel_tol=1e-6) else float(written)


def with_written_factor(
    text: Mapping[str, Any], view: RopeView, extension: Extension, settings: RopeSettings
) -> Extension:
    """The extension with a note on what becomes of an attention factor that the configuration writes out."""
    if extension.method != view.rope_type or settings.attention_factor is not None:
        return extension
    written = written_factor(text, view)
    if written is None:
        return extension
    start = f"The configuration writes the attention factor {written:g} out: "
    kept = "it is kept. Some engines compute the encoding's own; to change it in all, give `attention_factor`."
    note = start + (kept if extension.method == "yarn" else "it went with the lists that the new ones stand in for.")
    return replace(extension, notes=(*extension.notes, note))


def with_attention_factor(
    written: Mapping[str, Any], layer_type: str | None, extension: Extension, wanted: float | None, held: float
) -> Extension:
    """The extension with what the queries must be multiplied with to get the wanted factor, None for the encoding's.

    written: the new configuration. held: what they are multiplied with already, which is divided out.
    """
    if extension.method == "none" or (wanted is None and held == 1):
        return extension
    if written.get("clip_qkv") is not None:
        raise UserError(
            "The model clamps its queries after the projection, so their weights cannot hold an attention factor",
            where="context.attention_factor",
            fix="leave it out",
        )
    _, own = spectra.compute(written, spectra.select(written, layer_type), extension.length)
    scale, notes = 1.0, list(extension.notes)
    if held != 1:
        notes.append(f"An earlier extension's attention factor is divided out of the queries, which held x {held:.4g}.")
    if wanted is not None:
        scale = (wanted / own) ** 2
        notes.append(
            f"Attention factor {wanted:g} instead of {own:.4g}: the weights that make the queries hold it "
            f"(x {scale:.4g}), because some engines compute the encoding's own whatever the configuration says."
        )
    return replace(extension, query_scale=scale / held, notes=tuple(notes))
