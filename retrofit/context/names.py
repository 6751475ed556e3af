"""The rotary fields of `config.json` under the names of transformers 5 and the older ones, in agreement.

transformers 5 saves `rope_parameters` only. vLLM, llama.cpp's converter and older releases look for `rope_theta` and
`rope_scaling` and fall back to a default theta without a word when they are missing, so both are written.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import is_whole
from retrofit.context import frequencies as spectra
from retrofit.context.fields import (
    LAYER_THETAS,
    ROTARY,
    RopeView,
    as_dict,
    class_thetas,
    completed,
    kinds_of_layers,
    layer_thetas,
    left_to_the_class,
    original_length,
    text_part,
    views,
)
from retrofit.context.longrope import LONGROPE_ONLY

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OLDER = ("rope_scaling", "rope_theta", "rope_local_base_freq")
"""Names that transformers 5 reads and does not write."""
EXACT = {
    ("phi3", "longrope"): ("short_factor", "long_factor"),
    ("olmo", "linear"): ("factor",),
    ("olmo2", "linear"): ("factor",),
}
"""{(family, rope_type): keys}: in transformers 4 their classes refuse a `rope_scaling` of other keys than `type` and
these."""
RENAMED_EXPERTS = ("qwen3_moe",)
"""Families whose number of experts transformers 5 saves as `num_local_experts`, and 4 reads as `num_experts`."""
EXPERTS = (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts"))


def portable(config: PretrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a configuration with its rotary fields under the new and the old names, max length explicit.

    transformers itself saves `rope_parameters` only; readers of the older names would fall back to a default theta.
    """
    raw = dict(config) if isinstance(config, Mapping) else json.loads(config.to_json_string())
    prefix, text = text_part(raw if isinstance(config, Mapping) else as_dict(config))
    found = views(text)
    if not found or not is_whole(text.get("max_position_embeddings")):
        return raw
    return replaced(raw, prefix, rotary_fields(text, found, text["max_position_embeddings"]))


def with_theta(raw: Mapping[str, Any], loaded: PretrainedConfig) -> Mapping[str, Any]:
    """`config.json` without gaps: `completed`, and it says which theta its model has.

    Llama 2's says nothing about RoPE, Vicuna-16k's has a scaling and no theta, Gemma 3's leaves both thetas to the
    model's class. loaded: the same configuration as its class. A theta that was lost is not made up.
    """
    whole = completed(raw, loaded)
    prefix, text = text_part(whole)
    # An empty set of parameters, and a rotated share alone, say nothing of theta.
    silent = not any(text.get(name) for name in ROTARY if name != "partial_rotary_factor")
    known = class_thetas(loaded)
    if not known or not (silent or any(map(left_to_the_class, views(text)))):
        return whole
    theta = {"rope_theta": known.get("full_attention", known.get(None))}
    if "sliding_attention" in known and not hasattr(loaded.get_text_config(), LAYER_THETAS):
        theta["rope_local_base_freq"] = known["sliding_attention"]
    filled = {**theta, **{key: value for key, value in text.items() if value is not None}}
    return {**whole, "text_config": filled} if prefix else filled


def rotary_fields(
    text: Mapping[str, Any], found: tuple[RopeView, ...], length: int, original: int | None = None
) -> dict[str, Any]:
    """All rotary fields of `config.json`, under the names of transformers 5 and the older ones, in agreement."""
    full = next((view for view in found if view.layer_type in (None, "full_attention")), found[0])
    known = original if original is not None else original_length(text, full.parameters)
    parameters = _parameters(text, full, length, known)
    fields: dict[str, Any] = {"max_position_embeddings": length}
    if parameters.get("rope_theta") is not None:
        fields["rope_theta"] = parameters["rope_theta"]
    if not full.nested:
        fields["rope_parameters"] = parameters
        if thetas := layer_thetas(text):
            fields[LAYER_THETAS] = _new_thetas(text, thetas, found)
    else:
        fields["rope_parameters"] = {str(view.layer_type): dict(view.parameters) for view in found}
        fields["rope_parameters"][full.layer_type] = parameters
    local = next((view for view in found if view.layer_type == "sliding_attention"), None)
    if local is not None and str(text.get("model_type")).startswith("gemma3"):
        fields["rope_local_base_freq"] = local.parameters.get("rope_theta")
    if parameters.get("partial_rotary_factor") is not None:
        fields["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if older := rope_scaling(text.get("model_type"), parameters):
        fields["rope_scaling"] = older
    if known is not None and known < length and _at_top(text, parameters, original):
        fields["original_max_position_embeddings"] = known
    longer = text.get("max_sequence_length")  # vLLM takes the least of all such fields
    if is_whole(longer) and longer < length:
        fields["max_sequence_length"] = length
    return fields


def _new_thetas(text: Mapping[str, Any], thetas: list[float], found: tuple[RopeView, ...]) -> list[float]:
    """The base of each layer: that of the one set for its kind; its own where there are several."""
    result = []
    for kind, own in zip(kinds_of_layers(text, len(thetas)), thetas, strict=True):
        of_kind = [view.parameters["rope_theta"] for view in found if view.layer_type in (None, kind)]
        result.append(of_kind[0] if own and len(of_kind) == 1 else own)
    return result


def rope_scaling(family: object, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The older name's set: with theta, which CTranslate2 looks for inside, unless the family's class refuses that.

    None for plain RoPE, and where those keys cannot say the same: a phi3 with an attention factor of its own.
    """
    kind = parameters["rope_type"]
    if kind == "default":
        return None
    if keys := EXACT.get((str(family), kind)):
        if family in LONGROPE_ONLY and not parameters.keys().isdisjoint({"factor", "attention_factor"}):
            return None
        return {"type": kind, **{key: parameters[key] for key in keys if key in parameters}}
    return {key: value for key, value in parameters.items() if key != "partial_rotary_factor"}


def _parameters(text: Mapping[str, Any], view: RopeView, length: int, original: int | None) -> dict[str, Any]:
    """One set of `rope_parameters`, in which longrope says all that readers derive from different fields."""
    parameters = {key: value for key, value in view.parameters.items() if key != "type"} | {"rope_type": view.rope_type}
    if view.rope_type not in ("longrope", "su") or original is None or parameters.get("rope_theta") is None:
        return parameters
    parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    lengths = {"max_position_embeddings": length, "original_max_position_embeddings": original}
    _, scale = spectra.compute({**text, **lengths}, RopeView(view.where, view.layer_type, parameters))
    if text.get("model_type") not in LONGROPE_ONLY:
        return parameters | {"attention_factor": scale}
    # Transformers 4 allows no key for the factor there, and every reader takes the usual one.
    usual = math.isclose(scale, spectra.longrope_attention_factor(length / original, original), rel_tol=1e-6)
    left_out = ("factor", "attention_factor") if usual else ()
    return {key: value for key, value in parameters.items() if key not in left_out}


def _at_top(text: Mapping[str, Any], parameters: Mapping[str, Any], original: int | None) -> bool:
    """Whether the original length is written at the top level too.

    Not of yarn and of longrope with equal lists, where vLLM would take it for the longest context. transformers 4 looks
    there for the length at which longrope changes its lists. llama.cpp's converter looks for llama3's there alone, and
    takes 8192 when it is not there; a model that was trained with llama3, as Llama 3.1, was not extended and has none.
    """
    kind = parameters["rope_type"]
    if "original_max_position_embeddings" in text or kind in ("default", "linear"):
        return True
    if kind == "longrope":
        return bool(parameters.get("short_factor") != parameters.get("long_factor"))
    return kind == "llama3" and original is not None


def replaced(raw: Mapping[str, Any], prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` with other rotary fields, and the number of experts under both of its names."""
    names = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")
    result = copy.deepcopy(dict(raw))
    target = result["text_config"] if prefix else result
    for name in names:
        target.pop(name, None)
    target.update(copy.deepcopy(dict(fields)))
    for name, other in EXPERTS if target.get("model_type") in RENAMED_EXPERTS else ():
        if name in target:
            target.setdefault(other, target[name])
    return result
