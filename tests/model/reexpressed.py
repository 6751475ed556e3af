"""Tiny models of every architecture that is written as another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retrofit.checkpoint.staging import staged
from retrofit.model.reexpress import reexpress as write_reexpressed
from tests.tiny import VOCAB_SIZE, randomise, tiny_tokenizer

IDS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
NEOX = {**SIZES, "intermediate_size": 96}
MOE = {**NEOX, "num_local_experts": 3, "num_experts_per_tok": 2}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 96}
OPT = {**SIZES, "ffn_dim": 96}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}


def rope_of(share: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": share, **more}


# (source, target, fields, KV heads it can be converted to)
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("gpt_neox", "phi", {**NEOX, "rope_parameters": rope_of(0.25)}),
    ("gpt_neox", "phi", {**NEOX, "attention_bias": False, "tie_word_embeddings": True}),
    ("gpt_neox", "phi", {**NEOX, "rope_parameters": rope_of(1.0, rope_type="linear", factor=2.0)}),
    ("gpt_neox", "starcoder2", {**NEOX, "use_parallel_residual": False, "rope_parameters": rope_of(1.0)}),
    (
        "gpt_neox",
        "starcoder2",
        {
            **NEOX,
            "use_parallel_residual": False,
            "rope_parameters": rope_of(1.0),
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    ("gptj", "phi", {**GPT, "rotary_dim": 8}),
    ("gptj", "phi", {**GPT, "rotary_dim": 16, "n_inner": None, "tie_word_embeddings": True}),
    ("gpt2", "gpt_bigcode", GPT),
    ("gpt2", "gpt_bigcode", {**GPT, "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", "gpt_bigcode", {**GPT, "scale_attn_weights": False, "n_inner": None}),
    ("opt", "gpt_bigcode", OPT),
    (
        "opt",
        "gpt_bigcode",
        {
            **OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    ("qwen2", "llama", {**NEOX, "num_key_value_heads": 4}),
    ("qwen2", "llama", {**NEOX, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("llama", "granite_swa", {**NEOX, "num_key_value_heads": 4}),
    (
        "llama",
        "granite_swa",
        {
            **NEOX,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ),
    ("llama", "granite_swa", {**NEOX, "num_key_value_heads": 4, "rope_parameters": YARN}),
    ("llama", "ministral", {**NEOX, "num_key_value_heads": 4, "rope_parameters": YARN}),
    ("llama", "ministral", {**NEOX, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}),
    ("mistral", "ministral", {**NEOX, "num_key_value_heads": 4, "sliding_window": 16}),
    (
        "ministral",
        "granite_swa",
        {
            **NEOX,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    ("mistral", "granite_swa", {**NEOX, "num_key_value_heads": 4, "sliding_window": None}),
    ("mistral", "granite_swa", {**NEOX, "num_key_value_heads": 2, "sliding_window": 16}),
    ("qwen2", "granite_swa", {**NEOX, "num_key_value_heads": 4}),
    (
        "qwen2",
        "granite_swa",
        {
            **NEOX,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    ("smollm3", "granite_swa", {**NEOX, "num_key_value_heads": 4, "no_rope_layer_interval": 2}),
    (
        "smollm3",
        "granite_swa",
        {
            **NEOX,
            "num_key_value_heads": 2,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "attention_bias": True,
        },
    ),
    (
        "granite",
        "granite_swa",
        {
            **NEOX,
            "num_key_value_heads": 4,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    ("mixtral", "granitemoe_swa", {**MOE, "num_key_value_heads": 4, "rope_parameters": YARN, "head_dim": 16}),
    (
        "mixtral",
        "granitemoe_swa",
        {**MOE, "num_key_value_heads": 2, "head_dim": 24, "sliding_window": 16, "tie_word_embeddings": True},
    ),
    (
        "granitemoe",
        "granitemoe_swa",
        {
            **MOE,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
)
cases = pytest.mark.parametrize(
    ("source", "target", "fields"), CASES, ids=[f"{a}-{b}-{i}" for i, (a, b, _) in enumerate(CASES)]
)
# One of each source, for what does not depend on the variant.
FIRST = [next(case for case in CASES if case[:2] == pair) for pair in dict.fromkeys(case[:2] for case in CASES)]
firsts = pytest.mark.parametrize(("source", "target", "fields"), FIRST, ids=[f"{a}-{b}" for a, b, _ in FIRST])


def save(folder: Path, source: str, fields: dict[str, Any], *, dtype: str = "float32", shard: str = "5GB") -> Path:
    """A tiny random model whose norms and biases are far from ones and zeros, with a tokenizer."""
    config = AutoConfig.for_model(source, **{**IDS, **fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def reexpress(source: Path, out: Path, **options: Any) -> Any:
    with staged(out) as folder:
        return write_reexpressed(source, folder, **options)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one has no float64
    return model.eval().requires_grad_(False)


def ids(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1))


def cached_logits(model: Any, ids_BT: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prompt and of the tokens after it, one at a time."""
    with torch.no_grad():
        out = model(ids_BT[:, :prompt], use_cache=True)
        found = [out.logits]
        for i in range(prompt, ids_BT.shape[1]):
            out = model(ids_BT[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, 1)
