"""Into GraniteSWA: Llama's layers, each with a window or none, a RoPE base of its own and a sink for each query head.

Llama is its special case: multipliers that change nothing, scores scaled by head dim ** -0.5, sinks so far below zero
that they take no probability, and the same base in every layer. A window that the source has is kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from retrofit.model.families import describe
from retrofit.model.reexpress.base import HEADS, Made, Reexpression, common_fields, copied, zeros
from retrofit.model.reexpress.llama_like import fields_of, names_of, require_whole_heads

TARGET = "granite_swa"
NO_SINK = -1e4
"""The logit of a sink that takes nothing: beside any score its exponential is 0, in float16 as well."""

_NORMED = "it has a norm on queries and keys"
_EXPERTS = "its MLPs are experts"
_LAYER_NORM = "its norms subtract the mean"
REASONS = {
    "cohere": f"{_LAYER_NORM}, and attention and MLP stand side by side",
    "gemma": "its norms add one to their weight, and its embeddings are scaled in its own way",
    "gemma2": "its scores are soft-capped, and norms stand behind its branches",
    "gemma3_text": _NORMED,
    "gpt_bigcode": "its positions are learned",
    "mixtral": _EXPERTS,
    "olmo": "its norms subtract the mean and have no weight",
    "olmo2": f"{_NORMED}, and norms behind its branches",
    "olmoe": f"{_NORMED}, and {_EXPERTS}",
    "phi": f"{_LAYER_NORM}, and attention and MLP stand side by side",
    "phi3": "its query, key and value matrices are one, and only longrope lengthens its window",
    "qwen2_moe": _EXPERTS,
    "qwen3": _NORMED,
    "qwen3_moe": f"{_NORMED}, and {_EXPERTS}",
    "stablelm": _LAYER_NORM,
    "starcoder2": _LAYER_NORM,
}
"""Why the other known families do not become it."""

_NEUTRAL = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}


def from_llama(config: Any) -> Reexpression:
    """Llama, and Mistral, Ministral, Qwen2, SmolLM3 and Granite, whose layers differ from it by windows, biases, layers
    without RoPE and multipliers.

    Raises: UserError for rotary parameters that turn a part of each head.
    """
    spec = describe(config)
    require_whole_heads(spec, TARGET)
    first = spec.layers[0]
    biases = any(bias is not None for bias in (first.q_bias, first.o_bias))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    fields = fields_of(config, spec) | {name: getattr(config, name, value) for name, value in _NEUTRAL.items()}
    fields |= {
        "attention_multiplier": first.scaling,
        "attention_bias": biases,
        "mlp_bias": mlp_bias,
        "layer_rope_theta": [layer.rope.theta if layer.rope else 0.0 for layer in spec.layers],
    }
    tensors = copied({name: name for name in names_of(spec, mlp_bias=mlp_bias)})
    for layer in spec.layers:
        prefix = f"model.layers.{layer.index}.self_attn"
        if biases and layer.o_bias is None:
            tensors[f"{prefix}.o_proj.bias"] = zeros(spec.hidden_size)
        tensors[f"{prefix}.sinks"] = Made((), partial(torch.full, (layer.query_heads,), NO_SINK))
    return Reexpression(
        source=str(config.model_type),
        target=TARGET,
        architecture="GraniteSWAForCausalLM",
        fields=common_fields(config) | fields,
        tensors=tensors,
        ignored=(*HEADS, ".rotary_emb.inv_freq"),
        notes=(
            "transformers computes granite_swa with eager, flex_attention (on CUDA) or builds of flash attention that "
            "have sinks, not with sdpa",
        ),
    )
