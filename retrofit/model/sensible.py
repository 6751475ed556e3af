"""Whether the values of a loaded configuration make sense, so that what describes or builds the model can rely on them.

`require_sensible` looks at what the class of the model made of config.json, with its defaults. It is about the known
families and those that are re-expressed as one; what it lets pass, transformers can build and compute with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from retrofit.checkpoint.config import finite, is_number, is_whole
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.families import Family, family_of
from retrofit.model.families.refused import REEXPRESSED
from retrofit.model.foreign import foreign_values

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
_OPTIONAL_SIZES = (
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "original_max_position_embeddings",
)
_POSITIVE = (
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "query_pre_attn_scalar",
    "clip_qkv",
    "attn_logit_softcapping",
)
_NOT_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
# Switches that make another model of the same class: one that is no causal decoder, or has layers of several kinds.
_OTHER_MODELS = {
    "use_bidirectional_attention": "its attention is not causal",
    "add_cross_attention": "it attends to an encoder",
    "is_encoder_decoder": "it has an encoder",
    "is_heterogeneous": "its layers differ from each other",
    "text_config": "a text model has no text_config of its own",
}
_MOST_TOKEN_IDS = 64
_SHARE_NEEDED = ("phi", "stablelm")

Refuse = Callable[..., UserError]


def require_sensible(config: Any, where: str) -> None:
    """Raises UserError that names the first field of a text model's configuration that no model can have."""

    def refuse(name: str, what: str, fix: str = "correct it, or download config.json again") -> UserError:
        return UserError(what, where=f"{where}: {name}", fix=fix)

    for name, what in _OTHER_MODELS.items():
        value = getattr(config, name, None)
        if value or (name == "text_config" and value is not None):
            raise refuse(name, f"this is no plain causal language model: {what}", "choose another model")
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        value = getattr(config, name, None)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if not (is_whole(value) and value >= 1):
            raise refuse(name, f"`{name}` is {_value(value)}, not a whole number of at least 1")
    for names, fits, what in (
        (_POSITIVE, lambda value: value > 0, "a number above 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "a number of at least 0"),
    ):
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not (is_number(value) and fits(value)):
                raise refuse(name, f"`{name}` is {_value(value)}, not {what}")
    for name, value in config.to_dict().items():
        if not finite(value):
            raise refuse(name, f"`{name}` holds a number that is not finite")
    _require_heads(config, refuse)
    _require_activation(config, refuse)
    _require_layers(config, refuse)
    _require_experts(config, refuse)
    _require_token_ids(config, refuse)
    _require_rope(config, refuse, where)


def _require_heads(config: Any, refuse: Refuse) -> None:
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads is not None and heads % kv_heads:
        raise refuse(
            "num_key_value_heads",
            f"{heads} query heads cannot be shared evenly by {kv_heads} KV heads",
            "check the configuration: num_key_value_heads must divide num_attention_heads",
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise refuse("hidden_size", f"a width of {config.hidden_size} cannot be split into {heads} heads evenly")


def _require_activation(config: Any, refuse: Refuse) -> None:
    from transformers.activations import ACT2FN

    for name in _ACTIVATIONS:
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, str) and value in ACT2FN):
            raise refuse(name, f"transformers knows no activation {_value(value)}")


def _require_layers(config: Any, refuse: Refuse) -> None:
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
            raise refuse("layer_types", f"`layer_types` is no list of {layers} kinds of layers")
        other = next((kind for kind in kinds if kind not in LAYER_TYPES[:2]), None)
        if other is not None:
            raise refuse("layer_types", f"layers of the kind {_value(other)} are not supported", "choose another model")
    window = getattr(config, "sliding_window", None)
    if window is not None and not (is_whole(window) and window >= 0):
        raise refuse("sliding_window", f"`sliding_window` is {_value(window)}, not a number of tokens")
    slides = "sliding_attention" in kinds if kinds is not None else window == 0 and _slides_everywhere(config)
    if slides and not window:
        raise refuse("sliding_window", "layers have a sliding window, and `sliding_window` gives it no size")
    without = getattr(config, "no_rope_layers", None)
    if without is not None and not (
        isinstance(without, list) and len(without) == layers and all(flag in (0, 1) for flag in without)
    ):
        raise refuse("no_rope_layers", f"`no_rope_layers` is no list of {layers} zeros and ones")
    thetas = getattr(config, "layer_rope_theta", None)
    if thetas is not None and not (
        isinstance(thetas, list) and len(thetas) == layers and all(is_number(x) and (x == 0 or x > 1) for x in thetas)
    ):
        raise refuse("layer_rope_theta", f"`layer_rope_theta` is no list of {layers} numbers above 1, or 0 for no RoPE")


def _require_experts(config: Any, refuse: Refuse) -> None:
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if chosen is not None and experts is not None and chosen > experts:
        raise refuse("num_experts_per_tok", f"a token cannot pass {chosen} of {experts} experts")
    dense = getattr(config, "mlp_only_layers", None)
    if dense is not None and not (isinstance(dense, list) and all(map(is_whole, dense))):
        raise refuse("mlp_only_layers", "`mlp_only_layers` is no list of layers")
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None and not (is_whole(step) and step >= 1):
        raise refuse("decoder_sparse_step", f"`decoder_sparse_step` is {_value(step)}, not a number of layers")


def _require_token_ids(config: Any, refuse: Refuse) -> None:
    """Beginning, end and padding are tokens of the vocabulary; -1 and the like count from its end, as in torch.

    A default of the class may lie beyond a small vocabulary, where the file is silent: nobody asks for that token.
    """
    defaults = type(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if value is None or (value == getattr(defaults, name, None) and name != "pad_token_id"):
            continue
        if len(ids) > _MOST_TOKEN_IDS or not all(map(is_whole, ids)):
            raise refuse(name, f"`{name}` is {_value(value)}, not a token")
        beyond = next((one for one in ids if not -config.vocab_size <= one < config.vocab_size), None)
        if beyond is not None:
            raise refuse(name, f"`{name}` is {_value(beyond)}, and the vocabulary has {config.vocab_size} tokens")


def _require_rope(config: Any, refuse: Refuse, where: str) -> None:
    if not hasattr(config, "rope_parameters"):
        return
    parameters, kinds = config.rope_parameters, getattr(config, "layer_types", None)
    family = _family(config)
    if parameters is None and (family is None or family.learned_positions):
        return
    if not isinstance(parameters, Mapping):
        raise refuse("rope_parameters", "the rotary parameters are no object")
    if family is None or not family.rope_by_layer_type:
        nested = sorted(set(parameters) & set(LAYER_TYPES))
        if nested:
            raise refuse(
                f"rope_parameters.{nested[0]}",
                f"a {config.model_type} has one set of rotary parameters, not one for each kind of layer",
                "write rope_type and rope_theta directly into rope_parameters",
            )
        if family and not family.partial_rotary and parameters.get("partial_rotary_factor") not in (None, 1):
            raise refuse("rope_parameters.partial_rotary_factor", f"a {config.model_type} turns whole heads")
        if parameters.get("partial_rotary_factor") is None and config.model_type in _SHARE_NEEDED:
            raise refuse("partial_rotary_factor", "the rotated share of a head is null, which its class cannot read")
        _require_rotary(config, parameters, "rope_parameters", refuse)
        _require_computable(config, parameters["rope_type"], None, f"{where}: rope_parameters")
        return
    flat = sorted(set(map(str, parameters)) - set(LAYER_TYPES))
    if flat:
        raise refuse(
            f"rope_parameters.{shown(flat[0], 60)}",
            f"a {config.model_type} has rotary parameters for each kind of layer, and reads none beside them",
            "write them into rope_parameters.full_attention and .sliding_attention",
        )
    for kind in sorted(set(kinds or ())):
        if not isinstance(parameters.get(kind), Mapping):
            raise refuse(f"rope_parameters.{kind}", f"no rotary parameters for layers of the kind `{kind}`")
        _require_rotary(config, parameters[kind], f"rope_parameters.{kind}", refuse)
        _require_computable(config, parameters[kind]["rope_type"], kind, f"{where}: rope_parameters.{kind}")


def _slides_everywhere(config: Any) -> bool:
    family = _family(config)
    return family is not None and family.window == "all"


def _family(config: Any) -> Family | None:
    """The known family of the model; None for one that is re-expressed as another."""
    return None if config.model_type in REEXPRESSED else family_of(config)


def _require_rotary(config: Any, got: Mapping[str, Any], place: str, refuse: Refuse) -> None:
    """One set of rotary parameters, so that frequencies come out of it (`retrofit.context.frequencies`)."""
    kind = got.get("rope_type")
    if kind not in ROPE_TYPES:
        raise refuse(
            f"{place}.rope_type",
            f"transformers has no rotary encoding {_value(kind)} for a {config.model_type}",
            f"use one of {', '.join(ROPE_TYPES)}",
        )
    theta = got.get("rope_theta")
    if not (is_number(theta) and theta > 1):
        raise refuse(f"{place}.rope_theta", f"rope_theta is {_value(theta)}, not a number above 1")
    share = got.get("partial_rotary_factor")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if share is not None and not (is_number(share) and 0 < share <= 1):
        raise refuse(f"{place}.partial_rotary_factor", f"partial_rotary_factor is {_value(share)}, not above 0 to 1")
    dim = int(head_dim * (1 if share is None else share))
    if dim < 2 or dim % 2:
        raise refuse(place, f"RoPE turns pairs, and {dim} values of a head of {head_dim} are to be turned")
    for key in ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        value = got.get(key)
        if value is not None and not (is_number(value) and value > 0):
            raise refuse(f"{place}.{key}", f"{key} is {_value(value)}, not a number above 0")
    for key in ("mscale", "mscale_all_dim"):
        if got.get(key) is not None and not (is_number(got[key]) and got[key] >= 0):
            raise refuse(f"{place}.{key}", f"{key} is {_value(got[key])}, not a number of at least 0")
    original = got.get("original_max_position_embeddings")
    if original is not None and not (is_whole(original) and 1 < original < 2**31):
        raise refuse(f"{place}.original_max_position_embeddings", f"{_value(original)} is no number of tokens")
    if kind == "llama3" and got["low_freq_factor"] == got["high_freq_factor"]:
        raise refuse(f"{place}.high_freq_factor", "high_freq_factor equals low_freq_factor: between them lies a ramp")
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = got.get(key)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise refuse(f"{place}.{key}", f"`{key}` is no list of {dim // 2} numbers, one for each rotary pair")
        if not all(is_number(value) and value > 0 for value in values):
            raise refuse(f"{place}.{key}", f"`{key}` holds something else than numbers above 0")


def _require_computable(config: Any, kind: str, layer_type: str | None, where: str) -> None:
    """transformers' own function gives frequencies: what it needs beyond that differs by class."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind == "default":
        return
    with foreign_values("transformers cannot compute the rotary encoding", where, "correct the rotary parameters"):
        spectrum, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", layer_type=layer_type)
    if not (spectrum.isfinite().all() and is_number(float(scale))):
        raise UserError("the rotary parameters give frequencies that are not finite", where=where, fix="correct them")


def _value(value: object) -> str:
    return f"`{shown(value, 60)}`" if isinstance(value, str) else shown(repr(value), 60)
