"""Families that store q, k and v in one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retrofit.model.families.base import Conversion, Family
from retrofit.model.spec import AttentionSpec, TensorSlot


@dataclass(frozen=True)
class Fused(Family):
    """One matrix `qkv` of (query heads + 2 KV heads) x head dim rows, q first, and the output projection `o`."""

    qkv: str = "qkv_proj"
    o: str = "o_proj"

    def tensors(self, config: Any, index: int, head_dim: int) -> dict[str, Any]:
        """Row ranges of the fused matrix; none of these families has biases."""
        prefix = self.prefix(index)
        kv_rows = config.num_key_value_heads * head_dim
        q_end = config.num_attention_heads * head_dim
        k_end, v_end = q_end + kv_rows, q_end + 2 * kv_rows
        name = f"{prefix}{self.qkv}.weight"
        return {
            "q": TensorSlot(name, 0, q_end),
            "k": TensorSlot(name, q_end, k_end),
            "v": TensorSlot(name, k_end, v_end),
            "o": TensorSlot(f"{prefix}{self.o}.weight"),
        }


@dataclass(frozen=True)
class GPTBigCode(Family):
    """One KV head (multi_query: q rows, then those of the head), or one per query head (q, k and v by head)."""

    def kv_heads(self, config: Any) -> int:
        """1, or as many as query heads."""
        return 1 if config.multi_query else config.num_attention_heads

    def set_kv_heads(self, config: Any, kv_heads: int) -> None:
        """Both fields that say so."""
        config.multi_query = kv_heads == 1
        config.num_key_value_heads = kv_heads

    def conversions(self, spec: AttentionSpec) -> tuple[Conversion, ...]:
        """One KV head, or the model's own number."""
        current = spec.layers[0].kv_heads
        reason = "the class holds one KV head or one for each query head"
        return tuple(
            Conversion(heads, heads in (1, current), None if heads in (1, current) else reason)
            for heads in range(1, current + 1)
        )

    def tensors(self, config: Any, index: int, head_dim: int) -> dict[str, Any]:
        """Row ranges of c_attn, or of each head's block in it."""
        width = config.num_attention_heads * head_dim
        every = None if config.multi_query else 3 * head_dim
        start = width if config.multi_query else head_dim
        ends = (0, start, start + head_dim, start + 2 * head_dim)
        slots = {}
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            for slot, first, last in zip("qkv", ends[:-1], ends[1:], strict=True):
                slots[slot + suffix] = TensorSlot(f"{self.prefix(index)}c_attn.{kind}", first, last, every=every)
            slots["o" + suffix] = TensorSlot(f"{self.prefix(index)}c_proj.{kind}")
        return slots


TABLE: tuple[Family, ...] = (
    Fused("phi3", window="all", partial_rotary=True),
    GPTBigCode(
        "gpt_bigcode",
        scaling="scale_attn_weights",
        own_head_dim=False,
        learned_positions=True,
        mlp_gated=False,
        mlp_kept=2,
        mlp_width="n_inner",
        layers_path="transformer.h",
        attention_path="attn",
    ),
)
