"""The rotary fields of `config.json` under the names of transformers 5 and the older ones, in agreement.

transformers 5 saves `rope_parameters` only. vLLM, llama.cpp's converter and older releases look for `rope_theta` and
`rope_scaling` and fall back to a default theta without a word when they are missing, so both are written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import is_whole
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

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def portable(config: PretrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a configuration with its rotary fields under the new and the old names, max length explicit.

    transformers itself saves `rope_parameters` only; readers of the older names would fall back to a default theta.
    """
    raw = dict(config) if isinstance(config, Mapping) else json.loads(config.to_json_string())
    prefix, text = text_part(raw if isinstance(config, Mapping) else as_dict(config))
    found = views(text)
    if not found or "max_position_embeddings" not in text:
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
    parameters = {key: value for key, value in full.parameters.items() if key != "type"} | {"rope_type": full.rope_type}
    fields: dict[str, Any] = {"max_position_embeddings": length, "rope_theta": parameters.get("rope_theta")}
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
    # The older longrope of phi3 has no attention factor and allows no other key: it cannot say the same.
    new_only = "attention_factor" in parameters or ("factor" in parameters and text.get("model_type") == "phi3")
    if full.rope_type != "default" and not (full.rope_type == "longrope" and new_only):
        inside = ("rope_theta", "partial_rotary_factor")
        fields["rope_scaling"] = {key: value for key, value in parameters.items() if key not in inside}
    known = original if original is not None else original_length(text, full.parameters)
    # llama.cpp's converter looks for llama3's original length at the top only, and takes 8192 when it is not there. A
    # model that was trained with llama3, as Llama 3.1, has none there: it was not extended.
    of_all = full.rope_type in ("default", "linear") or (full.rope_type == "llama3" and original is not None)
    at_top = "original_max_position_embeddings" in text or of_all
    if known is not None and known < length and at_top:
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


def replaced(raw: Mapping[str, Any], prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    names = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")
    result = copy.deepcopy(dict(raw))
    target = result["text_config"] if prefix else result
    for name in names:
        target.pop(name, None)
    target.update(copy.deepcopy(dict(fields)))
    return result
