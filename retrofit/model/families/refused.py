"""Architectures that cannot hold fewer KV heads: refused with a reason, or re-expressed as one that can."""

from __future__ import annotations

_ONE_KV_PER_QUERY = "every query head has its own KV head and the class has no setting for fewer"
_FUSED_EQUAL = "q, k and v are one matrix with as many KV heads as query heads and the class has no setting for fewer"
_LATENT = "its cache holds one latent vector per token instead of KV heads"
_NO_ATTENTION = "it has no KV cache: its layers are recurrent"
_VISION = "it is a multimodal model; only text models are converted"

REASONS: dict[str, str] = {
    "bloom": f"{_FUSED_EQUAL}; positions are ALiBi",
    "codegen": _FUSED_EQUAL,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": "its fused matrix interleaves q, k and v by group, and the class has no attention interface",
    "gemma3": f"{_VISION} (its text-only sibling is gemma3_text)",
    "gpt2": f"{_FUSED_EQUAL} (stored transposed, as Conv1D)",
    "gpt_neo": _ONE_KV_PER_QUERY,
    "gpt_neox": f"{_FUSED_EQUAL} (interleaved by head)",
    "gpt_oss": "its published weights are MXFP4, which is not read, and its experts have biases",
    "gptj": _ONE_KV_PER_QUERY,
    "llama4": _VISION,
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "mpt": f"{_FUSED_EQUAL}; positions are ALiBi",
    "opt": f"{_ONE_KV_PER_QUERY}; positions are learned",
    "rwkv": _NO_ATTENTION,
    "xglm": _ONE_KV_PER_QUERY,
}

REEXPRESSED: dict[str, str] = {
    "gpt2": "gpt_bigcode",
    "gpt_neox": "phi",
    "gptj": "phi",
    "opt": "gpt_bigcode",
}
"""Those of them that are the same function as a known family (`retrofit.model.reexpress`). A gpt_neox without parallel
residual becomes starcoder2."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "granite": ("granite_swa",),
    "granitemoe": ("granitemoe_swa",),
    "llama": ("granite_swa", "ministral"),
    "ministral": ("granite_swa",),
    "mistral": ("granite_swa", "ministral"),
    "mixtral": ("granitemoe_swa",),
    "qwen2": ("llama", "granite_swa"),
    "smollm3": ("granite_swa",),
}
"""Known families that can also be re-expressed, on demand, and as what."""
