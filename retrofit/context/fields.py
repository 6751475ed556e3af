"""How the rotary fields of a configuration are read, without torch and without defaults that hide a gap.

Takes a `config.json` as a plain dict or a transformers configuration. `views` gives one record per set of rotary
parameters with the precedence transformers 5 uses: `rope_scaling` wins over `rope_parameters`, a value inside wins over
one at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Rotated share of a head where the file does not say, as the model classes of transformers assume.
DEFAULT_PARTIAL = {"phi": 0.5, "stablelm": 0.25}
GEMMA_LOCAL_THETA = 10_000.0


@dataclass(frozen=True)
class RopeView:
    """One set of rotary parameters. layer_type is None when all layers share it; where names it in the file."""

    where: str
    layer_type: str | None
    parameters: Mapping[str, Any]

    @property
    def rope_type(self) -> str:
        return str(self.parameters.get("rope_type") or self.parameters.get("type") or "default")


def as_dict(config: object) -> dict[str, Any]:
    """The configuration as a plain dict. A transformers configuration has its class defaults filled in already."""
    return dict(config) if isinstance(config, Mapping) else config.to_dict()  # type: ignore[attr-defined]


def text_part(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(prefix, the part that describes the language model); the prefix is "" or "text_config."."""
    inner = raw.get("text_config")
    return ("text_config.", inner) if isinstance(inner, Mapping) else ("", raw)


def is_nested(parameters: object) -> bool:
    """True for one dict per layer type."""
    return isinstance(parameters, Mapping) and any(key in LAYER_TYPES for key in parameters)


def views(raw: Mapping[str, Any]) -> tuple[RopeView, ...]:
    """Every set of rotary parameters of the language model, top-level values merged in; () without any."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    if raw.get("model_type") in ("gemma3", "gemma3_text") and not is_nested(parameters):
        return _gemma3_legacy(raw, scaling or parameters or {})
    name, chosen = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    if is_nested(parameters) and not is_nested(scaling):
        full = {**(parameters.get("full_attention") or {}), **(scaling or {})}  # type: ignore[union-attr]
        name, chosen = "rope_parameters", {**parameters, "full_attention": full}  # type: ignore[dict-item]
    if is_nested(chosen):
        return tuple(
            RopeView(f"{name}.{key}", key, _filled(raw, value))
            for key, value in chosen.items()  # type: ignore[union-attr]
            if key in LAYER_TYPES and isinstance(value, Mapping)
        )
    if not chosen and raw.get("rope_theta") is None:
        return ()
    return (RopeView(name if chosen else "rope_theta", None, _filled(raw, chosen or {})),)


def _gemma3_legacy(raw: Mapping[str, Any], scaling: Mapping[str, Any]) -> tuple[RopeView, ...]:
    local = raw.get("rope_local_base_freq", GEMMA_LOCAL_THETA)
    return (
        RopeView("rope_scaling", "full_attention", _filled(raw, scaling)),
        RopeView("rope_local_base_freq", "sliding_attention", {"rope_type": "default", "rope_theta": local}),
    )


def _filled(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(parameters)
    if merged.get("rope_theta") is None and raw.get("rope_theta") is not None:
        merged["rope_theta"] = raw["rope_theta"]
    partial = raw.get("partial_rotary_factor", DEFAULT_PARTIAL.get(str(raw.get("model_type"))))
    if merged.get("partial_rotary_factor") is None and partial is not None:
        merged["partial_rotary_factor"] = partial
    return merged


def head_dim(raw: Mapping[str, Any]) -> int:
    """Width of one attention head."""
    return int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])


def rotary_dim(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Rotated values of a head (twice the number of rotary pairs)."""
    partial = parameters.get("partial_rotary_factor")
    return int(head_dim(raw) * (1.0 if partial is None else float(partial)))


def original_length(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> int | None:
    """The window the model was trained with, when the file says so; None when it does not."""
    inside, outside = parameters.get("original_max_position_embeddings"), raw.get("original_max_position_embeddings")
    if raw.get("model_type") == "phi3" and outside is not None:
        return int(outside)
    value = inside if inside is not None else outside
    return None if value is None else int(value)
