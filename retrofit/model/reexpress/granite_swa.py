"""Into GraniteSWA: Llama's layers, each with a window or none, a RoPE base of its own and a sink for each query head.

Llama is its special case: multipliers that change nothing, scores scaled by head dim ** -0.5, sinks so far below zero
that they take no probability, and the same base in every layer. A window that the source has is kept. GraniteMoeSWA is
the same with Mixtral's experts for MLPs: softmax over the chosen experts' logits is Mixtral's softmax over all of them,
normalised over the chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retrofit.model.families import describe
from retrofit.model.families.experts import EXPERTS
from retrofit.model.reexpress.base import HEADS, Made, Reexpression, common_fields, copied, zeros
from retrofit.model.reexpress.llama_like import fields_of, gated_mlp, names_of, require_whole_heads
from retrofit.model.spec import AttentionSpec

TARGET, WITH_EXPERTS = TARGETS = ("granite_swa", "granitemoe_swa")
NO_SINK = -1e4
"""The logit of a sink that takes nothing: beside any score its exponential is 0, in float16 as well."""

_NORMED = "it has a norm on queries and keys"
_LAYER_NORM = "its norms subtract the mean"
_NO_EXPERTS = "its MLPs are no experts: it becomes granite_swa"
_EXPERTS = "its MLPs are experts: it becomes granitemoe_swa"
REASONS = {
    "cohere": f"{_LAYER_NORM}, and attention and MLP stand side by side",
    "gemma": "its norms add one to their weight, and its embeddings are scaled in its own way",
    "gemma2": "its scores are soft-capped, and norms stand behind its branches",
    "gemma3_text": _NORMED,
    "gpt_bigcode": "its positions are learned",
    "granite": _NO_EXPERTS,
    "granitemoe": _EXPERTS,
    "llama": _NO_EXPERTS,
    "ministral": _NO_EXPERTS,
    "mistral": _NO_EXPERTS,
    "mixtral": _EXPERTS,
    "olmo": "its norms subtract the mean and have no weight",
    "olmo2": f"{_NORMED}, and norms behind its branches",
    "olmoe": f"{_NORMED}, and the weights of its experts do not add up to one",
    "phi": f"{_LAYER_NORM}, and attention and MLP stand side by side",
    "phi3": "its query, key and value matrices are one, and only longrope lengthens its context",
    "qwen2": _NO_EXPERTS,
    "qwen2_moe": "the weights of its experts do not add up to one, and a gate scales its shared expert",
    "qwen3": _NORMED,
    "qwen3_moe": _NORMED,
    "smollm3": _NO_EXPERTS,
    "stablelm": _LAYER_NORM,
    "starcoder2": _LAYER_NORM,
}
"""Why a known family does not become the one, or the other."""

_NEUTRAL = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
_OF_EXPERTS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
_BLOCK = "block_sparse_moe"
_CLASSES = {"mixtral": ("mlp", "gate"), "granitemoe": (_BLOCK, "router")}
"""What the source's class calls the block of experts, and its router."""


def from_llama(config: Any) -> Reexpression:
    """Llama, and Mistral, Ministral, Qwen2, SmolLM3 and Granite, whose layers differ from it by windows, biases, layers
    without RoPE and multipliers.

    Raises: UserError for rotary parameters that turn a part of each head.
    """
    spec, mlp_bias = describe(config), bool(getattr(config, "mlp_bias", False))
    tensors = copied({name: name for name in names_of(spec, gated_mlp(bias=mlp_bias))})
    return _reexpression(config, spec, TARGET, "GraniteSWAForCausalLM", {"mlp_bias": mlp_bias}, tensors)


def from_experts(config: Any) -> Reexpression:
    """Mixtral, and GraniteMoe, whose layers differ from it by biases and multipliers.

    Raises: UserError for rotary parameters that turn a part of each head.
    """
    spec = describe(config)
    fields = {name: getattr(config, name) for name in _OF_EXPERTS} | {"shared_intermediate_size": 0}
    tensors = copied({name: name for name in names_of(spec, ())})
    block, router = _CLASSES[spec.family]
    for layer in spec.layers:
        prefix = f"model.layers.{layer.index}"
        for new, old in (("router", router), ("experts.gate_up_proj",) * 2, ("experts.down_proj",) * 2):
            kind = ".weight" if new == "router" else ""
            source = EXPERTS[spec.family].stored(f"{prefix}.{block}.{old}{kind}", config.num_local_experts)
            tensors[f"{prefix}.{_BLOCK}.{new}{kind}"] = _stack(source)
    return _reexpression(config, spec, WITH_EXPERTS, "GraniteMoeSWAForCausalLM", fields, tensors)


def _stack(stored: tuple[tuple[str, ...], ...]) -> Made:
    """Experts above each other, of `stored` names by expert; one tensor is taken as it is."""
    names = tuple(name for parts in stored for name in parts)
    return Made(names) if len(names) == 1 else Made(names, partial(_stacked, parts=len(stored[0])))


def _stacked(*matrices: Tensor, parts: int) -> Tensor:
    """[experts, parts x N, C] of [N, C] matrices, `parts` of each expert after each other."""
    return torch.stack(matrices).unflatten(0, (-1, parts)).flatten(1, 2)


def _reexpression(
    config: Any,
    spec: AttentionSpec,
    target: str,
    architecture: str,
    own: Mapping[str, Any],
    tensors: Mapping[str, Made],
) -> Reexpression:
    """own: fields that the target alone has. tensors: those that the source has."""
    require_whole_heads(spec, target)
    first = spec.layers[0]
    biases = any(bias is not None for bias in (first.q_bias, first.o_bias))
    fields = fields_of(config, spec) | {name: getattr(config, name, value) for name, value in _NEUTRAL.items()}
    fields |= {
        "attention_multiplier": first.scaling,
        "attention_bias": biases,
        "layer_rope_theta": [layer.rope.theta if layer.rope else 0.0 for layer in spec.layers],
    }
    added: dict[str, Made] = {}
    for layer in spec.layers:
        prefix = f"model.layers.{layer.index}.self_attn"
        if biases and layer.o_bias is None:
            added[f"{prefix}.o_proj.bias"] = zeros(spec.hidden_size)
        added[f"{prefix}.sinks"] = Made((), partial(torch.full, (layer.query_heads,), NO_SINK))
    return Reexpression(
        source=str(config.model_type),
        target=target,
        architecture=architecture,
        fields={**common_fields(config), **fields, **own},
        tensors={**tensors, **added},
        ignored=(*HEADS, ".rotary_emb.inv_freq"),
        notes=(
            f"transformers computes {target} with eager, flex_attention (on CUDA) or builds of flash attention that "
            "have sinks, not with sdpa",
        ),
    )
