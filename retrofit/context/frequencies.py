"""Rotary frequencies from the papers' formulas: the reference that written configurations are checked against.

D is the rotary dim, i = 0 .. D/2 - 1 a rotary pair, theta the base: theta_i = theta^(-2i/D) radians per token, its
wavelength 2 pi / theta_i tokens. s is the factor, L the original length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrofit.context.fields import (
    RopeView,
    as_dict,
    head_dim,
    original_length,
    require_numbers,
    rotary_dim,
    text_part,
    views,
)
from retrofit.errors import UserError
from retrofit.model.spec import RopeSpec


def base_frequencies(theta: float, dim: int) -> np.ndarray:
    """theta_i of plain RoPE (arXiv 2104.09864): float64 [D/2], radians per token."""
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def linear(theta: float, dim: int, factor: float) -> np.ndarray:
    """Position interpolation (arXiv 2306.15595, eq. 4): positions are divided by s, so frequencies are."""
    return base_frequencies(theta, dim) / factor


def ntk_theta(theta: float, dim: int, factor: float) -> float:
    """NTK-aware base: theta s^(D/(D-2)), which interpolates the slowest pair by exactly s and leaves the fastest alone.

    Composes: applying s1 and then s2 equals s1 s2. As in YaRN (arXiv 2309.00071, section 3.1).
    """
    return theta * factor ** (dim / (dim - 2))


def yarn_attention_factor(factor: float) -> float:
    """What cos and sin are multiplied with: sqrt(1/t) = 0.1 ln s + 1 (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def yarn(
    theta: float,
    dim: int,
    factor: float,
    original: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> np.ndarray:
    """NTK-by-parts (arXiv 2309.00071, section 3.2).

    A pair that turns more than beta_fast times within L is kept, one that turns less than beta_slow times is divided by
    s, with a linear ramp between. As in the authors' code the ramp runs over the index i, rounded outwards (truncate).
    """
    plain = base_frequencies(theta, dim)

    def index(turns: float) -> float:
        # i with L theta_i / (2 pi) = turns.
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (1 - interpolated) + plain / factor * interpolated


def llama3(
    theta: float, dim: int, factor: float, original: int, *, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0
) -> np.ndarray:
    """Llama 3.1 (arXiv 2407.21783 and its code): NTK-by-parts with the ramp over the turns L / wavelength."""
    plain = base_frequencies(theta, dim)
    turns = original * plain / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return plain * kept + plain / factor * (1 - kept)


def longrope_attention_factor(factor: float, original: int) -> float:
    """sqrt(1 + ln s / ln L) (arXiv 2402.13753, section 3.3)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def frequencies(
    config: object, layer_type: str | None = None, *, tokens: int | None = None
) -> tuple[np.ndarray, float]:
    """(inverse frequencies float64 [D/2] in radians per token, attention factor on cos and sin) of a configuration.

    config: a transformers configuration or a `config.json` dict. layer_type: which set, where layers differ (Gemma 3).
    tokens: length of the sequence, which only `dynamic` and `longrope` depend on; by default the original window.
    Raises UserError when a needed field is missing.
    """
    _, raw = text_part(as_dict(config))
    view = select(raw, layer_type)
    return compute(raw, view, tokens)


def of_layer(config: object, rope: RopeSpec) -> np.ndarray:
    """Inverse frequencies float64 [D/2] of one layer, radians per token, within the original window."""
    _, raw = text_part(as_dict(config))
    parameters = {"rope_theta": rope.theta, **rope.parameters, "rope_type": rope.rope_type}
    return compute(raw, RopeView("rope_parameters", None, parameters))[0]


def select(raw: Mapping[str, Any], layer_type: str | None) -> RopeView:
    """The view of one layer type; the only one there is when layer_type is None."""
    found = views(raw)
    for view in found:
        if view.layer_type == layer_type or (len(found) == 1 and view.layer_type is None):
            return view
    names = ", ".join(str(view.layer_type) for view in found) or "none"
    raise UserError(
        f"The configuration has no rotary parameters for layer type {layer_type!r}",
        where="config.json: rope_parameters",
        fix=f"ask for one of: {names}",
    )


def compute(raw: Mapping[str, Any], view: RopeView, tokens: int | None = None) -> tuple[np.ndarray, float]:
    """(inverse frequencies float64 [D/2], attention factor) of one view."""
    got, kind = view.parameters, view.rope_type
    require_numbers(view)

    def need(key: str) -> Any:
        found = original_length(raw, got) if key == "original_max_position_embeddings" else got.get(key)
        if found is None:
            raise UserError(
                f"rope_type `{kind}` needs `{key}`",
                where=f"config.json: {view.where}",
                fix=f"write `{key}` into rope_parameters (for the original length: the window before extension)",
            )
        return found

    theta, dim = float(need("rope_theta")), rotary_dim(raw, got)
    if kind == "default":
        return base_frequencies(theta, dim), 1.0
    if kind == "proportional":
        return _proportional(raw, got, theta), 1.0
    if kind == "linear":
        return linear(theta, dim, float(need("factor"))), 1.0
    if kind == "dynamic":
        window, factor = int(raw["max_position_embeddings"]), float(need("factor"))
        stretch = factor * max(tokens or 0, window) / window - (factor - 1)
        return base_frequencies(ntk_theta(theta, dim, stretch), dim), 1.0
    original = int(need("original_max_position_embeddings"))
    if kind == "llama3":
        low, high = float(need("low_freq_factor")), float(need("high_freq_factor"))
        factor = float(need("factor"))
        return llama3(theta, dim, factor, original, low_freq_factor=low, high_freq_factor=high), 1.0
    factor = float(got.get("factor") or raw["max_position_embeddings"] / original)
    if kind == "yarn":
        beta_fast, beta_slow = float(got.get("beta_fast") or 32), float(got.get("beta_slow") or 1)
        # transformers looks for `truncate` next to the layer types, never inside them.
        truncate = True if view.nested else bool(got.get("truncate", True))
        spectrum = yarn(theta, dim, factor, original, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate)
        return spectrum, _yarn_scale(got, factor)
    if kind == "longrope":
        stretch = need("long_factor") if (tokens or 0) > original else need("short_factor")
        scale = got.get("attention_factor")
        scale = longrope_attention_factor(factor, original) if scale is None else float(scale)
        return base_frequencies(theta, dim) / np.asarray(stretch, dtype=np.float64), scale
    raise UserError(
        f"Unknown rope_type `{kind}`",
        where=f"config.json: {view.where}",
        fix="use default, linear, dynamic, yarn, longrope, llama3 or proportional",
    )


def _proportional(raw: Mapping[str, Any], got: Mapping[str, Any], theta: float) -> np.ndarray:
    dim = head_dim(raw)
    pairs = int(float(got.get("partial_rotary_factor") or 1.0) * dim // 2)
    spectrum = base_frequencies(theta, dim) / float(got.get("factor") or 1.0)
    spectrum[pairs:] = 0.0
    return spectrum


def _yarn_scale(got: Mapping[str, Any], factor: float) -> float:
    if got.get("attention_factor") is not None:
        return float(got["attention_factor"])
    if got.get("mscale") and got.get("mscale_all_dim"):

        def scale(m: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

        return scale(float(got["mscale"])) / scale(float(got["mscale_all_dim"]))
    return yarn_attention_factor(factor)
