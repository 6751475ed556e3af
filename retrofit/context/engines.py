"""What transformers, vLLM and llama.cpp each make of a configuration's rotary fields, side by side.

Written from their sources (transformers 5.23; vLLM's rotary embeddings and its derived maximum length; llama.cpp's
converter and its rope op). The engines are not run here: a reading says what their code computes from these fields.
Encodings that change with the length are read at the whole window, vLLM's and llama.cpp's as started without options.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from retrofit.checkpoint.config import is_number, is_whole
from retrofit.context import frequencies as spectra
from retrofit.context.fields import RopeView, as_dict, original_length, rotary_dim, text_part, views

_MOST = 1e15  # no factor and no theta comes near it, and products of two are still numbers
_LLAMA3_IN_LLAMA_CPP = ("llama", "mistral", "mixtral", "granite", "smollm3")
_LONGROPE_IN_LLAMA_CPP = ("phi3", "phimoe", "minicpm", "minicpm3")
_LLAMA_CPP_LLAMA3_ORIGINAL = 8192
_SAME = 1e-4
_TRANSFORMERS, _VLLM, _LLAMA_CPP = "transformers", "vLLM", "llama.cpp"


@dataclass(frozen=True)
class Reading:
    """One engine's reading for one set of layers (layer_type None: all).

    first, last: inverse frequencies of the fastest and the slowest rotary pair, radians per token; digest: of all of
    them, to five digits, so that equal digests mean equal frequencies. attention_factor: on cos and sin. max_length:
    tokens it accepts as started. because: why it differs from transformers, "" where it does not.
    """

    engine: str
    layer_type: str | None
    rule: str
    first: float
    last: float
    digest: str
    attention_factor: float
    max_length: int
    because: str = ""


@dataclass(frozen=True)
class Difference:
    """One engine reads one thing differently from transformers. what: "frequencies", "attention" or "length"."""

    engine: str
    what: str
    where: str
    text: str
    fix: str


@dataclass(frozen=True)
class _Computed:
    rule: str
    frequencies: np.ndarray
    attention_factor: float
    max_length: int
    because: str = ""
    fix: str = ""


_Reader = Callable[[Mapping[str, Any], RopeView, int], _Computed]


def readings(config: object) -> tuple[Reading, ...]:
    """Three readings per set of rotary parameters; () where transformers itself could not compute, or has no RoPE."""
    return tuple(
        Reading(
            engine,
            view.layer_type,
            one.rule,
            float(one.frequencies[0]),
            float(one.frequencies[-1]),
            _digest(one.frequencies),
            one.attention_factor,
            one.max_length,
            one.because,
        )
        for view, found in _all(config)
        for engine, one in found.items()
    )


def differences(config: object) -> tuple[Difference, ...]:
    """What vLLM or llama.cpp would compute differently from transformers, with the reason and the fix."""
    found = []
    for view, by_engine in _all(config):
        own = by_engine[_TRANSFORMERS]
        for engine, other in by_engine.items():
            reason, fix = other.because, other.fix
            if not np.allclose(other.frequencies, own.frequencies, rtol=_SAME, atol=0.0):
                text = f"{engine} computes other frequencies ({_span(other)}; transformers {_span(own)}): {reason}"
                found.append(Difference(engine, "frequencies", view.where, text, fix))
            if not math.isclose(other.attention_factor, own.attention_factor, rel_tol=1e-3):
                text = (
                    f"{engine} uses attention factor {other.attention_factor:.4g}, transformers "
                    f"{own.attention_factor:.4g}: {reason or 'it does not read the one that is written'}"
                )
                fix_attention = fix or "leave it out where the usual value will do"
                found.append(Difference(engine, "attention", view.where, text, fix_attention))
            if other.max_length != own.max_length and view.layer_type != "sliding_attention":
                text = f"{engine} accepts {other.max_length} tokens, the model claims {own.max_length}: {reason}"
                found.append(Difference(engine, "length", "max_position_embeddings", text, fix))
    return tuple(found)


def _all(config: object) -> list[tuple[RopeView, dict[str, _Computed]]]:
    _, raw = text_part(as_dict(config))
    window = raw.get("max_position_embeddings")
    if not is_whole(window) or not 0 < window < 2**31:
        return []
    found = []
    for view in views(raw):
        if _complete(raw, view):  # of what is not, the other rules of the linter name the gap
            readers: dict[str, _Reader] = {_TRANSFORMERS: _transformers, _VLLM: _vllm, _LLAMA_CPP: _llama_cpp}
            found.append((view, {engine: read(raw, view, window) for engine, read in readers.items()}))
    return found


def _complete(raw: Mapping[str, Any], view: RopeView) -> bool:
    """Whether every number that the formulas need is there and makes sense."""
    got, kind = view.parameters, view.rope_type
    needed = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "longrope": (),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in needed or not all(_positive(got.get(key)) for key in ("rope_theta", *needed[kind])):
        return False
    dim = rotary_dim(raw, got)
    if got["rope_theta"] <= 1 or dim % 2 or dim < (4 if kind == "dynamic" else 2):
        return False
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor")
    if not all(got.get(key) is None or _positive(got[key]) for key in optional):
        return False
    if kind in ("yarn", "longrope", "llama3") and (original_length(raw, got) or 0) < 2:
        return False
    if kind == "llama3":
        return bool(got["high_freq_factor"] > got["low_freq_factor"])
    lists = [got.get("short_factor"), got.get("long_factor")] if kind == "longrope" else []
    pairs = rotary_dim(raw, got) // 2
    return all(isinstance(one, list) and len(one) == pairs and all(map(_positive, one)) for one in lists)


def _positive(value: object) -> TypeGuard[float]:
    return is_number(value) and 0 < value < _MOST


def _transformers(raw: Mapping[str, Any], view: RopeView, window: int) -> _Computed:
    spectrum, scale = spectra.compute(raw, view, window)
    return _Computed(view.rope_type, spectrum, scale, window)


def _vllm(raw: Mapping[str, Any], view: RopeView, window: int) -> _Computed:
    kind, got = view.rope_type, view.parameters
    theta, dim = float(got["rope_theta"]), rotary_dim(raw, got)
    spectrum, scale = spectra.compute(raw, view, window)
    length, because = _vllm_length(raw, window)
    fix = f"start it with --max-model-len {window}, or use ntk, yarn or llama3" if length != window else ""
    if kind == "dynamic":
        factor = float(got["factor"])
        stretch = factor * factor - (factor - 1)
        spectrum = spectra.base_frequencies(spectra.ntk_theta(theta, dim, stretch), dim)
        because = f"it scales every length as if it were {factor:g} x {window} tokens, and accepts as many"
        fix = "use yarn, llama3 or ntk, which are fixed"
    if kind == "yarn":
        truncate, original = bool(got.get("truncate", True)), original_length(raw, got)
        assert original is not None
        spectrum = spectra.yarn(
            theta,
            dim,
            float(got["factor"]),
            original,
            beta_fast=float(got.get("beta_fast") or 32),
            beta_slow=float(got.get("beta_slow") or 1),
            truncate=truncate,
        )
        scale = spectra.yarn_attention_factor(float(got["factor"]))
        if view.nested and not truncate:
            because = because or "it reads `truncate` inside a layer type, transformers does not"
            fix = fix or "remove `truncate`"
    if kind == "longrope":
        original = original_length(raw, got)
        assert original is not None
        lists = got["long_factor"] if length > original else got["short_factor"]
        spectrum = spectra.base_frequencies(theta, dim) / np.asarray(lists, dtype=np.float64)
        scale = spectra.longrope_attention_factor(window / original, original)
        if got["short_factor"] != got["long_factor"]:
            because = because or "it takes the long factors for every length"
    return _Computed(kind, spectrum, scale, length, because, fix)


def _vllm_length(raw: Mapping[str, Any], window: int) -> tuple[int, str]:
    """(tokens vLLM accepts by default, why that is not the window)."""
    if "gemma3" in str(raw.get("model_type")):
        return window, ""
    length, factor, because = float(window), 1.0, ""
    for view in views(raw):
        if view.rope_type in ("su", "longrope", "llama3"):
            continue
        given = view.parameters.get("factor", factor)
        factor = float(given) if _positive(given) else 1.0
        if view.rope_type == "yarn":
            length = float(original_length(raw, view.parameters) or window)
            because = "it derives yarn's window as original length x factor"
        elif factor != 1:
            because = "it multiplies max_position_embeddings by the factor once more"
    original = raw.get("original_max_position_embeddings")
    if is_whole(original) and any(view.rope_type == "longrope" for view in views(raw)):
        return original, "for longrope it starts with the original length and the short factors"
    return int(length * factor), because if int(length * factor) != window else ""


def _llama_cpp(raw: Mapping[str, Any], view: RopeView, window: int) -> _Computed:
    kind, got, family = view.rope_type, view.parameters, str(raw.get("model_type"))
    theta, dim = float(got["rope_theta"]), rotary_dim(raw, got)
    plain = spectra.base_frequencies(theta, dim)
    use = "use ntk or yarn for llama.cpp"
    if view.layer_type == "sliding_attention":
        return _Computed("default", plain, 1.0, window, "it never scales sliding layers", "leave those layers unscaled")
    if kind == "dynamic":
        because = "it has no dynamic scaling and computes plain RoPE"
        return _Computed("default", plain, 1.0, window, because, use)
    if kind == "longrope":
        if family not in _LONGROPE_IN_LLAMA_CPP:
            because = f"it reads longrope's factors on phi3 and minicpm only; on {family} it computes plain RoPE"
            return _Computed("default", plain, 1.0, window, because, use)
        original = original_length(raw, got)
        assert original is not None
        lists = got["long_factor"] if window > original else got["short_factor"]
        scale = spectra.longrope_attention_factor(window / original, original)
        because = "it computes the attention factor from window / original length"
        return _Computed("longrope", plain / np.asarray(lists, dtype=np.float64), scale, window, because)
    if kind == "llama3":
        if family not in _LLAMA3_IN_LLAMA_CPP:
            because = f"it reads llama3 on the llama architecture only; on {family} it computes plain RoPE"
            return _Computed("default", plain, 1.0, window, because, use)
        original = int(raw.get("original_max_position_embeddings") or _LLAMA_CPP_LLAMA3_ORIGINAL)
        low, high = float(got["low_freq_factor"]), float(got["high_freq_factor"])
        spectrum = spectra.llama3(
            theta, dim, float(got["factor"]), original, low_freq_factor=low, high_freq_factor=high
        )
        because = f"it looks for the original length at the top level of config.json and takes {original}"
        fix = "write original_max_position_embeddings at the top level too"
        return _Computed("llama3", spectrum, 1.0, window, because, fix)
    if kind == "yarn":
        original = original_length(raw, got)
        assert original is not None
        fast, slow = float(got.get("beta_fast") or 32), float(got.get("beta_slow") or 1)
        factor = float(got["factor"])
        spectrum = spectra.yarn(theta, dim, factor, original, beta_fast=fast, beta_slow=slow)
        because = (
            "it always rounds the ramp (truncate)"
            if got.get("truncate") is False
            else ("it computes yarn's own attention factor and ignores a written one")
        )
        return _Computed("yarn", spectrum, spectra.yarn_attention_factor(factor), window, because)
    spectrum, scale = spectra.compute(raw, view, window)
    return _Computed(kind, spectrum, scale, window)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(",".join(f"{value:.4e}" for value in values).encode()).hexdigest()[:8]


def _span(one: _Computed) -> str:
    return f"{one.rule} {one.frequencies[0]:.3g} to {one.frequencies[-1]:.3g}"
