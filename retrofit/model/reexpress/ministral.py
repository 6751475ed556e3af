"""Into Ministral: Mistral's layers, each with a window or none; one RoPE for all, and neither biases nor sinks."""

from __future__ import annotations

from typing import Any

from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.model.reexpress.base import HEADS, Reexpression, common_fields, copied
from retrofit.model.reexpress.llama_like import fields_of, gated_mlp, names_of, require_whole_heads

TARGET = "ministral"


def from_llama(config: Any) -> Reexpression:
    """Llama without biases, and Mistral, whose windows are kept.

    Raises: UserError for biases, and for rotary parameters that turn a part of each head.
    """
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UserError(
                f"{TARGET} has no biases, and this model has",
                where=f"{name} of config.json",
                fix="take the target granite_swa, which has them",
            )
    spec = describe(config)
    require_whole_heads(spec, TARGET)
    return Reexpression(
        source=str(config.model_type),
        target=TARGET,
        architecture="MinistralForCausalLM",
        fields=common_fields(config) | fields_of(config, spec),
        tensors=copied({name: name for name in names_of(spec, gated_mlp())}),
        ignored=(*HEADS, ".rotary_emb.inv_freq"),
    )
