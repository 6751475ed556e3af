"""How serving engines store keys and values in fewer bits: what each type is, and its bytes. Torch-free.

It is the engine's doing and no property of a checkpoint: the same folder is served with any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retrofit.errors import UserError
from retrofit.model.spec import AttentionSpec

AUTO = "auto"
"""As they are computed, in the model's dtype."""


@dataclass(frozen=True)
class StoredAs:
    """Bits of a value, and values that share one scale of `scale_bytes`: a block of the head dim, or all of it (None).

    engine: which one stores them so, and what its option is called there.
    """

    bits: int
    block: int | None
    scale_bytes: int
    engine: str

    def head_bytes(self, head_dim: int) -> int:
        """Bytes of one key, or one value, of one head. head_dim: a multiple of the block."""
        return head_dim * self.bits // 8 + self.scale_bytes * (head_dim // (self.block or head_dim))


CACHE_DTYPES: Mapping[str, StoredAs] = {
    "fp8_e4m3": StoredAs(8, None, 0, "vLLM, --kv-cache-dtype fp8_e4m3"),
    "int8": StoredAs(8, None, 4, "vLLM, --kv-cache-dtype int8_per_token_head"),
    "q8_0": StoredAs(8, 32, 2, "llama.cpp, --cache-type-k q8_0 --cache-type-v q8_0"),
    "q4_0": StoredAs(4, 32, 2, "llama.cpp, --cache-type-k q4_0 --cache-type-v q4_0"),
}


PAIRED = frozenset(
    {
        "llama",
        "mistral",
        "ministral",
        "mixtral",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "smollm3",
        "olmo",
    }
)
"""Families whose keys llama.cpp's converter reorders, the two of every rotary pair side by side: blocks are of that
order. (Of ministral and those with `_swa`, which the converter on PyPI does not know, as of mistral and granite.)"""


def served_with(cache_dtype: str) -> str:
    """What a result read under this type has to say of it; empty for "auto"."""
    if cache_dtype == AUTO:
        return ""
    return (
        f"Measured with keys and values as {CACHE_DTYPES[cache_dtype].engine} stores them: that is what a serving "
        "engine does, and nothing of it is in the checkpoint."
    )


def cache_bytes(spec: AttentionSpec, tokens: int, cache_dtype: str, value_bytes: int) -> int:
    """Bytes of the KV cache of one sequence of `tokens` tokens; a sliding layer keeps its window only.

    value_bytes: of a value as it is computed, for "auto".
    """
    if cache_dtype == AUTO:
        return spec.kv_cache_bytes(tokens, value_bytes)
    stored = CACHE_DTYPES[cache_dtype]
    return sum(
        2 * layer.kv_heads * stored.head_bytes(layer.head_dim) * min(tokens, layer.window or tokens)
        for layer in spec.layers
    )


def unstorable(spec: AttentionSpec, cache_dtype: str) -> str | None:
    """Why the engine cannot store the keys and values of a model so; None where it can."""
    block = None if cache_dtype == AUTO else CACHE_DTYPES[cache_dtype].block
    if block is None:
        return None
    odd = next((layer.head_dim for layer in spec.layers if layer.head_dim % block), None)
    if odd is None:
        return None
    return f"{cache_dtype} stores blocks of {block} values, and the head dim of {odd} is no multiple of it"


def require_storable(spec: AttentionSpec, cache_dtype: str, where: str) -> None:
    """Raises UserError as `unstorable` says, as llama.cpp refuses to start."""
    if reason := unstorable(spec, cache_dtype):
        raise UserError(reason, where=where, fix="use fp8_e4m3 or int8, which store a head as a whole, or auto")
