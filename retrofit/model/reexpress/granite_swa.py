"""Into GraniteSWA: Llama's layers, each with a window or none, a RoPE base of its own and a sink for each query head.

Llama is its special case: multipliers that change nothing, scores scaled by head dim ** -0.5, sinks so far below zero
that they take no probability, and the same base in every layer. A window that the source has is kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.model.reexpress.base import HEADS, Made, Reexpression, common_fields, copied, zeros

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

_KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_dropout",
)
_IF_THERE = ("original_max_position_embeddings", "max_sequence_length")
_NEUTRAL = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}


def from_llama(config: Any) -> Reexpression:
    """Llama, and Mistral, Qwen2, SmolLM3 and Granite, whose layers differ from it by windows, biases, layers without
    RoPE and multipliers.

    Raises: UserError for rotary parameters that turn a part of each head.
    """
    spec = describe(config)
    first = spec.layers[0]
    if any(layer.rope is not None and layer.rope.rotary_dim != layer.head_dim for layer in spec.layers):
        raise UserError(
            f"{TARGET} turns whole heads, and this model a part of each",
            where="partial_rotary_factor of config.json",
            fix="convert it as it is, without re-expression",
        )
    windows = {layer.window for layer in spec.layers if layer.window}
    assert len(windows) <= 1, "one sliding_window for all layers"
    biases = any(bias is not None for bias in (first.q_bias, first.o_bias))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    fields = {name: getattr(config, name) for name in _KEPT}
    fields |= {name: value for name in _IF_THERE if (value := getattr(config, name, None)) is not None}
    fields |= {name: getattr(config, name, neutral) for name, neutral in _NEUTRAL.items()}
    fields |= {
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "attention_multiplier": first.scaling,
        "attention_bias": biases,
        "mlp_bias": mlp_bias,
        "rope_parameters": dict(config.rope_parameters),
        "layer_rope_theta": [layer.rope.theta if layer.rope else 0.0 for layer in spec.layers],
        "layer_types": ["sliding_attention" if layer.window else "full_attention" for layer in spec.layers],
        # Its class makes a mask of this size, whether a layer reads it or not.
        "sliding_window": windows.pop() if windows else spec.max_position_embeddings,
    }
    names, tensors = ["model.embed_tokens.weight", "model.norm.weight"], dict[str, Made]()
    for layer in spec.layers:
        prefix = f"model.layers.{layer.index}"
        names += [f"{prefix}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        slots = (layer.q, layer.k, layer.v, layer.o, layer.q_bias, layer.k_bias, layer.v_bias, layer.o_bias)
        names += [slot.name for slot in slots if slot is not None]
        kinds = ("weight", "bias") if mlp_bias else ("weight",)
        names += [f"{prefix}.mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in kinds]
        if biases and layer.o_bias is None:
            tensors[f"{prefix}.self_attn.o_proj.bias"] = zeros(spec.hidden_size)
        tensors[f"{prefix}.self_attn.sinks"] = Made((), partial(torch.full, (layer.query_heads,), NO_SINK))
    if not spec.tied_embeddings:
        names.append("lm_head.weight")
    return Reexpression(
        source=str(config.model_type),
        target=TARGET,
        architecture="GraniteSWAForCausalLM",
        fields=common_fields(config) | fields,
        tensors=copied({name: name for name in names}) | tensors,
        ignored=(*HEADS, ".rotary_emb.inv_freq"),
        notes=(
            "transformers computes granite_swa with eager, flex_attention (on CUDA) or builds of flash attention that "
            "have sinks, not with sdpa",
        ),
    )
