"""How the rotary fields of a configuration are read, without torch and without defaults that hide a gap.

Takes a `config.json` as a plain dict or a transformers configuration. `views` gives one record per set of rotary
parameters with the precedence transformers 5 uses: `rope_scaling` wins over `rope_parameters`, a value inside wins over
one at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from retrofit.checkpoint.config import is_number, is_whole
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.sensible import LAYER_TYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Rotated share of a head where the file does not say, as the model classes of transformers assume.
DEFAULT_PARTIAL = {"phi": 0.5, "stablelm": 0.25}
LAYER_THETAS = "layer_rope_theta"
"""A field with the base of each layer, 0 for one without RoPE (granite_swa). All else is shared by all layers."""
ROTARY = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    LAYER_THETAS,
    "rope_local_base_freq",
    "partial_rotary_factor",
)
_WITH_LAYER_THETAS = ("granite_swa", "granitemoe_swa")
_MOST_HEAD_DIM = 1 << 14
_MOST_LAYERS = 1 << 14
_MOST = 1e15  # no factor and no theta comes near it, and products of two are still numbers
NUMBERS = (
    "rope_theta",
    "factor",
    "partial_rotary_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
)
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

    @property
    def nested(self) -> bool:
        """Whether these layers have a set of their own in the file; else they share all but the base."""
        return self.layer_type is not None and self.where != LAYER_THETAS


def as_dict(config: object) -> dict[str, Any]:
    """The configuration as a plain dict. A transformers configuration has its class defaults filled in already."""
    return dict(config) if isinstance(config, Mapping) else config.to_dict()  # type: ignore[attr-defined]


def text_part(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(prefix, the part that describes the language model); the prefix is "" or "text_config."."""
    inner = raw.get("text_config")
    return ("text_config.", inner) if isinstance(inner, Mapping) else ("", raw)


def completed(raw: Mapping[str, Any], loaded: PretrainedConfig) -> dict[str, Any]:
    """`config.json` with what the model's class fills in where the file is silent, but for the rotary fields.

    Of those a gap is worth knowing (`retrofit.context.lint`). loaded: the same configuration as its class.
    """
    prefix, text = text_part(raw)
    known = as_dict(loaded.get_text_config())
    whole = {**{key: value for key, value in known.items() if key not in ROTARY}, **text}
    return {**raw, "text_config": whole} if prefix else whole


def class_thetas(loaded: PretrainedConfig) -> dict[str | None, float]:
    """The base of each layer type (None: of all layers) as the model's class loads it, its defaults filled in."""
    found = views(as_dict(loaded.get_text_config()))
    thetas = {view.layer_type: view.parameters.get("rope_theta") for view in found}
    return {layer_type: theta for layer_type, theta in thetas.items() if theta is not None}


def left_to_the_class(view: RopeView) -> bool:
    """Whether a set of parameters leaves its base to the model's class, as files of before `rope_theta` do.

    They have the old name `rope_scaling`. transformers writes a base into every `rope_parameters`, and null where an
    assignment dropped it: there it was lost.
    """
    return view.where == "rope_scaling" and "rope_theta" not in view.parameters


def is_nested(parameters: object) -> TypeGuard[Mapping[str, Any]]:
    """True for one dict per layer type."""
    return isinstance(parameters, Mapping) and any(key in LAYER_TYPES for key in parameters)


def views(raw: Mapping[str, Any]) -> tuple[RopeView, ...]:
    """Every set of rotary parameters of the language model, top-level values merged in; () without any."""
    scaling, parameters = (_object(raw.get(name)) for name in ("rope_scaling", "rope_parameters"))
    if raw.get("model_type") in ("gemma3", "gemma3_text") and not is_nested(parameters):
        return _gemma3_legacy(raw, scaling or parameters or {})
    name, chosen = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    if is_nested(parameters) and not is_nested(scaling):
        full = {**(_object(parameters.get("full_attention")) or {}), **(scaling or {})}
        name, chosen = "rope_parameters", {**parameters, "full_attention": full}
    if is_nested(chosen):
        return tuple(
            RopeView(f"{name}.{key}", key, _filled(raw, value, key))
            for key, value in chosen.items()
            if key in LAYER_TYPES and isinstance(value, Mapping)
        )
    if thetas := layer_thetas(raw):
        return _by_theta(raw, thetas, _filled(raw, chosen or {}))
    if not chosen and raw.get("rope_theta") is None:
        return ()
    return (RopeView(name if chosen else "rope_theta", None, _filled(raw, chosen or {})),)


def layer_thetas(raw: Mapping[str, Any]) -> list[float] | None:
    """The base of each layer (0: no RoPE) in an architecture that has one for each; None in others, and without any."""
    thetas, layers = raw.get(LAYER_THETAS), raw.get("num_hidden_layers")
    if isinstance(thetas, list):
        return thetas if thetas and all(map(is_number, thetas)) else None
    if raw.get("model_type") not in _WITH_LAYER_THETAS or not is_whole(layers) or not 0 < layers <= _MOST_LAYERS:
        return None
    theta = _filled(raw, _object(raw.get("rope_parameters")) or {}).get("rope_theta")  # what its class gives to all
    return [theta] * layers if is_number(theta) else None


def kinds_of_layers(raw: Mapping[str, Any], layers: int) -> list[str]:
    """The kind of each layer, "full_attention" where the file does not say."""
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers and all(kind in LAYER_TYPES for kind in kinds):
        return kinds
    return ["full_attention"] * layers


def _by_theta(raw: Mapping[str, Any], thetas: list[float], shared: Mapping[str, Any]) -> tuple[RopeView, ...]:
    """A set for each kind of layer and each base that layers of the kind have; one for all where all are full."""
    kinds = kinds_of_layers(raw, len(thetas))
    found = sorted({(kind, theta) for kind, theta in zip(kinds, thetas, strict=True) if theta})
    several = any(kind != "full_attention" for kind, _ in found)
    return tuple(
        RopeView(LAYER_THETAS, kind if several else None, {**shared, "rope_theta": theta}) for kind, theta in found
    )


def _gemma3_legacy(raw: Mapping[str, Any], scaling: Mapping[str, Any]) -> tuple[RopeView, ...]:
    local = raw.get("rope_local_base_freq", GEMMA_LOCAL_THETA)
    return (
        # transformers looks for `rope_type` alone here: `type` does not change the type that stands there already.
        RopeView("rope_scaling", "full_attention", _filled(raw, {"rope_type": "default", **scaling})),
        RopeView("rope_local_base_freq", "sliding_attention", {"rope_type": "default", "rope_theta": local}),
    )


def _object(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def _filled(raw: Mapping[str, Any], parameters: Mapping[str, Any], layer_type: str | None = None) -> dict[str, Any]:
    merged = dict(parameters)
    local = layer_type == "sliding_attention" and raw.get("model_type") in ("gemma3", "gemma3_text")
    theta = raw.get("rope_local_base_freq", GEMMA_LOCAL_THETA) if local else raw.get("rope_theta")
    if merged.get("rope_theta") is None and theta is not None:
        merged["rope_theta"] = theta
    partial = raw.get("partial_rotary_factor", DEFAULT_PARTIAL.get(str(raw.get("model_type"))))
    if merged.get("partial_rotary_factor") is None and partial is not None:
        merged["partial_rotary_factor"] = partial
    return merged


def require_numbers(view: RopeView) -> None:
    """UserError that names the first rotary parameter of a file which is no number where formulas need one."""
    for key in NUMBERS:
        value, least = view.parameters.get(key), 1 if key == "rope_theta" else 0
        if value == 0 and key == "mscale_all_dim":
            continue  # as DeepSeek writes that there is none
        if value is not None and not (is_number(value) and least < value < _MOST):
            raise UserError(
                f"{key} is {shown(repr(value), 60)}, not a number above {least}",
                where=f"config.json: {view.where}",
                fix="correct it, or download config.json again",
            )


def head_dim(raw: Mapping[str, Any]) -> int:
    """Width of one attention head; 0 where the file does not say it in numbers."""
    own, width, heads = (raw.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if not (is_whole(own) and own > 0):
        own = width // heads if is_whole(width) and is_whole(heads) and min(width, heads) > 0 else 0
    return own if own <= _MOST_HEAD_DIM else 0


def rotary_dim(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Rotated values of a head (twice the number of rotary pairs)."""
    partial = parameters.get("partial_rotary_factor")
    share = 1.0 if partial is None else partial
    return int(head_dim(raw) * share) if is_number(share) and 0 < share <= 1 else 0


def original_length(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> int | None:
    """The window the model was trained with, when the file says so; None when it does not.

    transformers takes the one at the top level, but where each kind of layer has parameters of its own.
    """
    inside, outside = parameters.get("original_max_position_embeddings"), raw.get("original_max_position_embeddings")
    first, second = (inside, outside) if is_nested(raw.get("rope_parameters")) else (outside, inside)
    value = second if first is None else first
    if value is None:
        value = _scaled_from(raw, parameters)
    return value if is_whole(value) and 1 < value < 2**31 else None


def trained_length(raw: Mapping[str, Any], window: int) -> int:
    """The window that the weights know. Vicuna-16k and LongChat say it in `max_sequence_length`, and in
    `max_position_embeddings`, here `window`, the original one."""
    longer = raw.get("max_sequence_length")
    return max(longer, window) if is_whole(longer) else window


def _scaled_from(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> int | None:
    """`max_position_embeddings`, where `max_sequence_length` is that times the factor: it is the original length."""
    factor, window = parameters.get("factor"), raw.get("max_position_embeddings")
    if not (is_number(factor) and is_whole(window) and factor > 1):
        return None
    return window if trained_length(raw, window) == factor * window else None
