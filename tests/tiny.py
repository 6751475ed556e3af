"""Tiny random models of every family, and a byte-level tokenizer, all built in code.

They prove identities and shapes, never quality: weights are random, with norm weights and biases far from their usual
ones and zeros so that a forgotten one changes the logits. 2 layers, 4 query heads, 4 KV heads, head dim 16, width 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB_SIZE = 264
"""256 bytes, five special tokens, three unused rows."""

SPECIAL_TOKENS = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "start": "<|im_start|>", "end": "<|im_end|>"}
BOS_ID, EOS_ID, PAD_ID, START_ID, END_ID = range(256, 261)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}

_GRANITE = {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
_SWA: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "layer_rope_theta": [50000.0, 1000.0],
}

# What a family needs beyond the common values to show its own peculiarities in two layers.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "ministral": {"head_dim": 16, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 32, "attn_logit_softcapping": 10.0},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo": {},
    "olmo2": {},
    "phi": {},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "starcoder2": {},
    "cohere": {},
    "granite": _GRANITE,
    "granite_swa": {**_GRANITE, **_SWA},
    "granitemoe": {**_GRANITE, **_EXPERTS},
    "granitemoe_swa": {**_GRANITE, **_EXPERTS, **_SWA},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"original_max_position_embeddings": 512},
    "mixtral": _EXPERTS,
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_bigcode": {"multi_query": False, "n_inner": 96},
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)

# Settings that change what attention computes, for tests that want every branch: (family, overrides).
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"attention_bias": True}),
    ("llama", {"head_dim": 24}),
    ("llama", {"num_key_value_heads": 2}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("gemma", {"attention_bias": True}),
    ("olmo", {"clip_qkv": 0.5}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"qk_layernorm": True, "use_qkv_bias": False}),
    ("starcoder2", {"use_bias": False, "sliding_window": 16}),
    ("cohere", {"use_qk_norm": True}),
    ("granite_swa", {"attention_bias": True, "layer_types": ["sliding_attention"] * 2, "layer_rope_theta": [0, 1e4]}),
    ("granite_swa", {"head_dim": 24, "layer_types": ["full_attention"] * 2, "layer_rope_theta": [1e4, 1e4]}),
    ("granitemoe_swa", {"attention_bias": True, "shared_intermediate_size": 48, "layer_rope_theta": [0, 1e4]}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 16, "no_rope_layer_interval": 2}),
    ("phi3", {"sliding_window": 16, "partial_rotary_factor": 0.5}),
    ("mixtral", {"sliding_window": 16}),
    ("qwen2_moe", {"qkv_bias": False, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3_moe", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 16}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("olmoe", {"clip_qkv": 0.5}),
    ("gpt_bigcode", {"multi_query": True, "num_key_value_heads": 1}),
    ("gpt_bigcode", {"scale_attn_weights": False, "tie_word_embeddings": False}),
)


ONE_ENCODING: dict[str, dict[str, Any]] = {
    name: {"layer_types": ["full_attention"] * 2, "layer_rope_theta": [1e4, 1e4]}
    for name in ("granite_swa", "granitemoe_swa")
}
"""Settings with which all layers of a family share one rotary encoding, where its own show several."""


def tiny_config(family: str, **over: Any) -> Any:
    """The configuration of a tiny model of `family`; `over` are fields of its transformers configuration."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_COMMON, **_FAMILIES[family], **over})


def tiny_model(family: str, *, seed: int = 0, **over: Any) -> Any:
    """A tiny random model of `family` in float32 and eval mode; the same seed gives the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family, **over), attn_implementation="eager")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one has no float64
    randomise(model, seed)
    return model.to(torch.float32).eval()


def randomise(model: Any, seed: int = 0) -> None:
    """Overwrites every parameter: matrices keep their input's scale, norms and biases leave their usual values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def tiny_tokenizer(*, chat_template: bool = False, add_bos: bool = False) -> Any:
    """One token per UTF-8 byte and the special tokens; `add_bos` makes the tokenizer prepend <s> by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS["bos"],
        eos_token=SPECIAL_TOKENS["eos"],
        pad_token=SPECIAL_TOKENS["pad"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    chat_template: bool = False,
    add_bos: bool = False,
    max_shard_size: str = "5GB",
    **over: Any,
) -> Path:
    """Writes a tiny model with its tokenizer to `folder` (made if missing) as stock transformers does; returns it."""
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, seed=seed, **over).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(chat_template=chat_template, add_bos=add_bos).save_pretrained(folder)
    return folder
