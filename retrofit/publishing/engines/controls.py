"""What an engine computes that ignores a part of the configuration: the models that a difference is compared with."""

from __future__ import annotations

from typing import Any

from retrofit.context.engines import NORMALISED
from retrofit.context.fields import LAYER_THETAS, RopeView, as_dict, layer_thetas, text_part, views
from retrofit.context.learned import has_table

OTHER_THETA = 10_000.0
"""The base that engines take where they do not read the model's."""
UNLIMITED = 1 << 24
"""Tokens of a sliding window that hides nothing."""


def controls_of(config: object) -> dict[str, dict[str, Any]]:
    """By name, the fields of the (text) configuration that are replaced. config: as transformers 5 loads it.

    The scaling of positions is ignored; where there is none, the base is lost. Sliding windows are ignored where all
    layers have them by one field, and so is `norm_topk_prob` where it is another than the family's usual one. Learned
    positions have neither: the scale of attention is ignored.
    """
    _, text = text_part(as_dict(config))
    if has_table(text):
        return {"attention scale ignored": {"scale_attn_weights": False}}
    found: dict[str, dict[str, Any]] = {}
    read = views(text)
    full = next((view for view in read if view.layer_type in (None, "full_attention")), None)
    if full is not None and full.rope_type != "default":
        found["scaling ignored"] = {"rope_parameters": _plain(read, full, full.parameters["rope_theta"])}
    elif full is not None:
        theta = OTHER_THETA if full.parameters["rope_theta"] != OTHER_THETA else 2 * OTHER_THETA
        thetas = layer_thetas(text)
        if thetas:
            found["theta lost"] = {LAYER_THETAS: [theta if one else 0 for one in thetas]}
        else:
            found["theta lost"] = {"rope_parameters": _plain(read, full, theta)}
    if text.get("sliding_window") and text.get("use_sliding_window", True) and len(read) == 1:
        found["window ignored"] = {"sliding_window": UNLIMITED}
    usual = NORMALISED.get(str(text.get("model_type")))
    if usual is not None and (text.get("norm_topk_prob") is True) != usual:
        found[f"expert weights {'' if usual else 'not '}normalised"] = {"norm_topk_prob": usual}
    return found


def _plain(read: tuple[RopeView, ...], full: RopeView, theta: float) -> dict[str, Any]:
    """All sets of rotary parameters, that of full attention without a scaling."""
    plain = {"rope_type": "default", "rope_theta": theta}
    if full.parameters.get("partial_rotary_factor") is not None:
        plain["partial_rotary_factor"] = full.parameters["partial_rotary_factor"]
    if full.layer_type is None:
        return plain
    return {**{str(view.layer_type): dict(view.parameters) for view in read}, full.layer_type: plain}
