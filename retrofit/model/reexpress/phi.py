"""Into Phi: models whose attention and MLP read the same residual stream side by side, with rotary positions.

Phi has one LayerNorm per layer for both branches and a bias on every matrix. GPT-NeoX has two LayerNorms: they differ
only in their affine part, which goes into the matrices that read them (W gamma, b + W beta), and the norm that is left
has weight 1 and bias 0. GPT-J has one LayerNorm and rotates neighbouring features: its q and k rows are put in order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from retrofit.errors import UserError
from retrofit.model.reexpress.base import (
    HEADS,
    Made,
    Reexpression,
    common_fields,
    heads_of_block,
    ones,
    pair,
    partial_factor,
    scaled,
    shifted,
    to_half_split,
    zeros,
)

TARGET = "phi"


def from_gpt_neox(config: Any) -> Reexpression:
    """GPT-NeoX with parallel residual (Pythia)."""
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    bias = config.attention_bias

    def folded(layer: str, norm: str, matrix: str, made: str, cut: Any, has_bias: bool) -> dict[str, Made]:
        """Weight and bias of a matrix behind a norm; `cut` takes the wanted rows."""
        w, b = f"{layer}.{matrix}.weight", f"{layer}.{matrix}.bias"

        def add_bias(w_NC: Tensor, beta_C: Tensor, b_N: Tensor | None = None) -> Tensor:
            return shifted(cut(w_NC), beta_C, None if b_N is None else cut(b_N))

        return {
            f"{made}.weight": Made((w, f"{layer}.{norm}.weight"), lambda w_NC, gamma_C: scaled(cut(w_NC), gamma_C)),
            f"{made}.bias": Made((w, f"{layer}.{norm}.bias", *((b,) if has_bias else ())), add_bias),
        }

    tensors = pair("model.embed_tokens", "gpt_neox.embed_in", bias=False)
    for i in range(config.num_hidden_layers):
        old, new = f"gpt_neox.layers.{i}", f"model.layers.{i}"
        for which, name in enumerate("qkv"):
            cut = partial(heads_of_block, which=which, head_dim=head_dim)
            tensors |= folded(
                old, "input_layernorm", "attention.query_key_value", f"{new}.self_attn.{name}_proj", cut, bias
            )
        tensors |= pair(f"{new}.self_attn.dense", f"{old}.attention.dense", bias=bias)
        if not bias:
            tensors[f"{new}.self_attn.dense.bias"] = zeros(width)
        tensors |= folded(
            old, "post_attention_layernorm", "mlp.dense_h_to_4h", f"{new}.mlp.fc1", lambda tensor: tensor, True
        )
        tensors |= pair(f"{new}.mlp.fc2", f"{old}.mlp.dense_4h_to_h")
        tensors |= {f"{new}.input_layernorm.weight": ones(width), f"{new}.input_layernorm.bias": zeros(width)}
    tensors |= pair("model.final_layernorm", "gpt_neox.final_layer_norm")
    if not config.tie_word_embeddings:
        tensors |= pair("lm_head", "lm_head", bias=False)
    tensors["lm_head.bias"] = zeros(config.vocab_size)
    fields = {
        "hidden_size": width,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.layer_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
    }
    return _phi(config, "gpt_neox", fields, tensors, folds=True)


def from_gptj(config: Any) -> Reexpression:
    """GPT-J."""
    width, head_dim, rotary = config.hidden_size, config.hidden_size // config.num_attention_heads, config.rotary_dim
    if not rotary:
        raise UserError(
            "the model rotates no stated part of its heads",
            where="rotary_dim of config.json",
            fix="write the number of rotated features per head",
        )
    turned = partial(to_half_split, head_dim=head_dim, rotary_dim=rotary)
    tensors = pair("model.embed_tokens", "transformer.wte", bias=False)
    for i in range(config.num_hidden_layers):
        old, new = f"transformer.h.{i}", f"model.layers.{i}"
        tensors |= pair(f"{new}.input_layernorm", f"{old}.ln_1")
        for name in "qk":
            tensors[f"{new}.self_attn.{name}_proj.weight"] = Made((f"{old}.attn.{name}_proj.weight",), turned)
        tensors |= pair(f"{new}.self_attn.v_proj", f"{old}.attn.v_proj", bias=False)
        tensors |= pair(f"{new}.self_attn.dense", f"{old}.attn.out_proj", bias=False)
        tensors |= {f"{new}.self_attn.{name}.bias": zeros(width) for name in ("q_proj", "k_proj", "v_proj", "dense")}
        tensors |= pair(f"{new}.mlp.fc1", f"{old}.mlp.fc_in") | pair(f"{new}.mlp.fc2", f"{old}.mlp.fc_out")
    tensors |= pair("model.final_layernorm", "transformer.ln_f")
    if not config.tie_word_embeddings:
        tensors |= pair("lm_head", "lm_head", bias=False)
    tensors |= {"lm_head.bias": Made(("lm_head.bias",))}
    fields = {
        "hidden_size": width,
        "intermediate_size": config.n_inner or 4 * width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.activation_function,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.layer_norm_epsilon,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": partial_factor(rotary, head_dim),
        },
        "resid_pdrop": config.resid_pdrop,
        "embd_pdrop": config.embd_pdrop,
        "attention_dropout": config.attn_pdrop,
    }
    return _phi(config, "gptj", fields, tensors)


def _phi(
    config: Any, source: str, fields: dict[str, Any], tensors: dict[str, Made], *, folds: bool = False
) -> Reexpression:
    prefix = "gpt_neox." if source == "gpt_neox" else "transformer."
    return Reexpression(
        source=source,
        target=TARGET,
        architecture="PhiForCausalLM",
        fields=common_fields(config) | fields | {"num_key_value_heads": config.num_attention_heads},
        tensors=tensors,
        prefixes=((prefix, ""), ("lm_head.", "embed_out.")),
        ignored=(*HEADS, ".attn.bias", ".attention.bias", ".masked_bias", ".rotary_emb.inv_freq", ".embed_positions"),
        folds=folds,
    )
