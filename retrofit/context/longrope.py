"""Encodings as LongRoPE's lists of divisors (arXiv 2402.13753), which are all that one family reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrofit.checkpoint.config import is_whole
from retrofit.context import frequencies as spectra
from retrofit.context.fields import RopeView
from retrofit.errors import UserError
from retrofit.recipe.schema import RopeSettings

LONGROPE_ONLY = ("phi3",)
"""Families whose configuration class knows no other rope_type than default and longrope."""


def folds(family: object, method: str) -> bool:
    """Whether a method is written as longrope's lists on this family, and its attention factor in the queries."""
    return family in LONGROPE_ONLY and method in ("linear", "yarn", "llama3")


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


def as_longrope(text: Mapping[str, Any], view: RopeView) -> tuple[RopeView, float]:
    """(the same spectrum as longrope with equal lists, the attention factor that belongs to it).

    The lists alone do not say the factor: readers compute longrope's own, so the weights must make up the difference.
    """
    got = view.parameters
    wanted, scale = spectra.compute(text, view)
    divisors = (spectra.base_frequencies(got["rope_theta"], 2 * len(wanted)) / wanted).tolist()
    kept = {key: got[key] for key in ("rope_theta", "partial_rotary_factor") if key in got}
    both = {"rope_type": "longrope", "short_factor": divisors, "long_factor": list(divisors)}
    return RopeView(view.where, view.layer_type, {**kept, **both}), scale


def written_as_longrope(
    text: Mapping[str, Any], view: RopeView, original: int, held: float
) -> tuple[str, float] | None:
    """(the method, its factor) whose defaults `as_longrope` wrote as these lists; None for any other lists.

    held: what the queries are multiplied with. Where it is 1, the attention factor has to be the method's own as well.
    """
    got, window = view.parameters, text.get("max_position_embeddings")
    if view.rope_type != "longrope" or text.get("model_type") not in LONGROPE_ONLY or not is_whole(window):
        return None
    if got.get("short_factor") != got.get("long_factor"):
        return None
    spectrum, scale = spectra.compute(text, view)
    common = {key: got[key] for key in ("rope_theta", "partial_rotary_factor") if key in got}
    # The slowest pair is divided by the factor, unless it lies on a ramp.
    slowest = spectra.base_frequencies(got["rope_theta"], 2 * len(spectrum))[-1] / spectrum[-1]
    for factor in (window / original, float(f"{slowest:.9g}")):
        for method in ("yarn", "linear", "llama3"):
            ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if method == "llama3" else {}
            lengths = {"factor": factor, "original_max_position_embeddings": original}
            asked = RopeView(view.where, view.layer_type, {**common, **ramp, **lengths, "rope_type": method})
            wanted, own = spectra.compute(text, asked)
            same = held != 1 or math.isclose(scale, own, rel_tol=1e-6)
            if same and np.allclose(spectrum, wanted, rtol=1e-6, atol=0.0):
                return method, factor
    return None
