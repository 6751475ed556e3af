"""Re-expressions that only rename and cut: sequential GPT-NeoX into Starcoder2, Qwen2 into Llama."""

from __future__ import annotations

from functools import partial
from typing import Any

from retrofit.errors import UserError
from retrofit.model.reexpress.base import HEADS, Made, Reexpression, common_fields, copied, heads_of_block, pair, zeros
from retrofit.model.reexpress.llama_like import KEPT


def starcoder2_from_gpt_neox(config: Any) -> Reexpression:
    """GPT-NeoX whose MLP follows its attention, with every feature of a head rotated: the layers of Starcoder2."""
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    if int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)) != head_dim:
        raise UserError(
            "no architecture with shared KV heads has a sequential GPT-NeoX layer that rotates only part of each head",
            where="use_parallel_residual and rotary_pct of config.json",
            fix="choose a GPT-NeoX model with parallel residual (Pythia), or one with rotary_pct 1",
        )
    bias = config.attention_bias
    tensors = pair("model.embed_tokens", "gpt_neox.embed_in", bias=False)
    for i in range(config.num_hidden_layers):
        old, new = f"gpt_neox.layers.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias") if bias else ("weight",):
            for which, name in enumerate("qkv"):
                cut = partial(heads_of_block, which=which, head_dim=head_dim)
                source = f"{old}.attention.query_key_value.{kind}"
                tensors[f"{new}.self_attn.{name}_proj.{kind}"] = Made((source,), cut)
        tensors |= pair(f"{new}.self_attn.o_proj", f"{old}.attention.dense", bias=bias)
        if not bias:
            tensors |= {f"{new}.self_attn.{name}_proj.bias": zeros(width) for name in "qkvo"}
        tensors |= pair(f"{new}.mlp.c_fc", f"{old}.mlp.dense_h_to_4h")
        tensors |= pair(f"{new}.mlp.c_proj", f"{old}.mlp.dense_4h_to_h")
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors |= pair(f"{new}.{name}", f"{old}.{name}")
    tensors |= pair("model.norm", "gpt_neox.final_layer_norm")
    if not config.tie_word_embeddings:
        tensors |= pair("lm_head", "lm_head", bias=False)
    rope = {key: value for key, value in config.rope_parameters.items() if key != "partial_rotary_factor"}
    fields = {
        "hidden_size": width,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.layer_norm_eps,
        "rope_parameters": rope,
        "use_bias": True,
        "sliding_window": None,
        "residual_dropout": config.hidden_dropout,
        "embedding_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
    }
    return Reexpression(
        source="gpt_neox",
        target="starcoder2",
        architecture="Starcoder2ForCausalLM",
        fields=common_fields(config) | fields,
        tensors=tensors,
        prefixes=(("gpt_neox.", ""), ("lm_head.", "embed_out.")),
        ignored=(*HEADS, ".attention.bias", ".masked_bias", ".rotary_emb.inv_freq"),
    )


def llama_from_qwen2(config: Any) -> Reexpression:
    """Qwen2 without active windows: Llama with biases on q, k, v and a zero one on the output projection."""
    if "sliding_attention" in config.layer_types:
        raise UserError(
            "Llama has no sliding windows, and some layers of this model use them",
            where="use_sliding_window of config.json",
            fix="convert it as qwen2, without re-expression",
        )
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    tensors: dict[str, Made] = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        names += [f"{layer}.self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")]
        names.append(f"{layer}.self_attn.o_proj.weight")
        names += [f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        names += [f"{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        tensors[f"{layer}.self_attn.o_proj.bias"] = zeros(config.hidden_size)
    if not config.tie_word_embeddings:
        names.append("lm_head.weight")
    fields = {name: getattr(config, name) for name in (*KEPT, "num_key_value_heads")}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields |= {"rope_parameters": dict(config.rope_parameters), "attention_bias": True, "head_dim": head_dim}
    return Reexpression(
        source="qwen2",
        target="llama",
        architecture="LlamaForCausalLM",
        fields=common_fields(config) | fields,
        tensors=copied({name: name for name in names}) | tensors,
        ignored=(*HEADS, ".rotary_emb.inv_freq"),
    )
