"""Encodings as LongRoPE's lists of divisors (arXiv 2402.13753), which are all that one family reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrofit.context import frequencies as spectra
from retrofit.context.fields import RopeView
from retrofit.errors import UserError
from retrofit.recipe.schema import RopeSettings

LONGROPE_ONLY = ("phi3",)
"""Families whose configuration class knows no other rope_type than default and longrope."""


def lists(settings: RopeSettings, pairs: int) -> dict[str, Any]:
    """The factors of a recipe: divisors of the frequencies, one per rotary pair. UserError for another number."""
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


def as_longrope(
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


def written_as_longrope(text: Mapping[str, Any], view: RopeView, original: int) -> str | None:
    """The method whose defaults `as_longrope` wrote as these lists; None for any other lists."""
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
