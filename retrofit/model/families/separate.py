"""Families that store q, k, v and the output projection as separate matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retrofit.model.families.base import Family, QKNormTable, switched
from retrofit.model.spec import TensorSlot


@dataclass(frozen=True)
class Separate(Family):
    """Four matrices; `o` is what the family calls the output projection."""

    o: str = "o_proj"

    def tensors(self, config: Any, index: int, head_dim: int) -> dict[str, Any]:
        """One whole tensor per projection."""
        prefix = self.prefix(index)
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": self.o}
        slots = {slot: TensorSlot(f"{prefix}{name}.weight") for slot, name in names.items()}
        if switched(config, self.qkv_bias):
            slots |= {f"{slot}_bias": TensorSlot(f"{prefix}{names[slot]}.bias") for slot in "qkv"}
        if switched(config, self.o_bias):
            slots["o_bias"] = TensorSlot(f"{prefix}{self.o}.bias")
        return slots


_PLAIN_MLP: dict[str, Any] = {"mlp_gated": False, "mlp_kept": 2}  # before and after the activation
_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_GRANITE: dict[str, Any] = {
    **_ATTENTION_BIAS,
    "scaling": "attention_multiplier",
    "residual": "residual_multiplier",
}
_SWA: dict[str, Any] = {"window": "layer_types", "layer_rope_theta": True, "sinks": "sinks"}
_HEAD_NORM = QKNormTable("head", "q_norm.weight", "k_norm.weight")

TABLE: tuple[Separate, ...] = (
    Separate("llama", **_ATTENTION_BIAS),
    Separate("mistral", window="all"),
    Separate("ministral", window="layer_types"),
    Separate("qwen2", qkv_bias=True, window="layer_types"),
    Separate("qwen3", **_ATTENTION_BIAS, window="layer_types", qk_norm=_HEAD_NORM),
    Separate("gemma", **_ATTENTION_BIAS),
    Separate(
        "gemma2",
        **_ATTENTION_BIAS,
        scaling="query_pre_attn_scalar",
        window="layer_types",
        softcap=True,
        residual="norm",
    ),
    Separate(
        "gemma3_text",
        **_ATTENTION_BIAS,
        scaling="query_pre_attn_scalar",
        window="layer_types",
        softcap=True,
        rope_by_layer_type=True,
        residual="norm",
        qk_norm=QKNormTable("head", "q_norm.weight", "k_norm.weight", offset=1.0),
    ),
    Separate("olmo", **_ATTENTION_BIAS, clip_qkv=True),
    Separate(
        "olmo2",
        **_ATTENTION_BIAS,
        residual="norm",
        qk_norm=QKNormTable("full", "q_norm.weight", "k_norm.weight"),
    ),
    Separate(
        "phi",
        mlp_gated=False,
        mlp_kept=5,  # its GELU is composed of several operations
        qkv_bias=True,
        o_bias=True,
        o="dense",
        partial_rotary=True,
        qk_norm=QKNormTable(
            "head",
            "q_layernorm.weight",
            "k_layernorm.weight",
            kind="layer",
            when="qk_layernorm",
            eps="layer_norm_eps",
            bias=True,
        ),
    ),
    Separate(
        "stablelm",
        qkv_bias="use_qkv_bias",
        partial_rotary=True,
        own_head_dim=False,
        qk_norm=QKNormTable(
            "head",
            "q_layernorm.norms.{head}.weight",
            "k_layernorm.norms.{head}.weight",
            kind="layer",
            weights="separate",
            when="qk_layernorm",
            eps="layer_norm_eps",
        ),
    ),
    Separate("starcoder2", **_PLAIN_MLP, qkv_bias="use_bias", o_bias="use_bias", window="all"),
    Separate(
        "cohere",
        **_ATTENTION_BIAS,
        pairing="interleaved",
        qk_norm=QKNormTable(
            "head",
            "q_norm.weight",
            "k_norm.weight",
            kind="layer",
            weights="stacked",
            when="use_qk_norm",
            eps="layer_norm_eps",
        ),
    ),
    Separate("mixtral", window="all"),
    Separate(
        "qwen2_moe",
        mlp_width="moe_intermediate_size",
        shared_expert_width="shared_expert_intermediate_size",
        qkv_bias="qkv_bias",
        window="layer_types",
    ),
    Separate("qwen3_moe", mlp_width="moe_intermediate_size", **_ATTENTION_BIAS, window="all", qk_norm=_HEAD_NORM),
    Separate("olmoe", **_ATTENTION_BIAS, clip_qkv=True, qk_norm=QKNormTable("full", "q_norm.weight", "k_norm.weight")),
    Separate("granite", **_GRANITE),
    Separate("granite_swa", **_GRANITE, **_SWA),
    Separate("granitemoe", **_GRANITE),
    Separate("granitemoe_swa", **_GRANITE, **_SWA, shared_expert_width="shared_intermediate_size"),
    Separate(
        "smollm3",
        **_ATTENTION_BIAS,
        window="layer_types",
        window_when="use_sliding_window",
        no_rope_layers=True,
    ),
)
