"""Families that store q, k and v in one matrix, q rows first, then k, then v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retrofit.model.families.base import Family, attention_prefix
from retrofit.model.spec import TensorSlot


@dataclass(frozen=True)
class Fused(Family):
    """One matrix `qkv` of (query heads + 2 KV heads) x head dim rows, and the output projection `o`."""

    qkv: str = "qkv_proj"
    o: str = "o_proj"

    def tensors(self, config: Any, index: int, head_dim: int) -> dict[str, Any]:
        """Row ranges of the fused matrix; none of these families has biases."""
        prefix = attention_prefix(index)
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


TABLE: tuple[Fused, ...] = (Fused("phi3", window="all", partial_rotary=True),)
