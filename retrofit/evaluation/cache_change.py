"""How much smaller a KV cache has become, and by what: fewer KV heads, sliding windows, values of fewer bytes.

Imports nothing heavy: help is instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit import format as fmt

if TYPE_CHECKING:
    from retrofit.evaluation.result import ModelEvaluation

SAME = 1e-3
"""A ratio this near to 1 is no change."""


@dataclass(frozen=True)
class CacheChange:
    """tokens: in the cache. before, after: its bytes. heads, dtype, windows: what each of these divides it by, so that
    their product divides it in all; that of windows is for so many tokens."""

    tokens: int
    before: int
    after: int
    heads: float = 1.0
    dtype: float = 1.0
    windows: float = 1.0

    @property
    def ratio(self) -> float:
        """How many times smaller it is."""
        return self.before / self.after

    @property
    def smaller(self) -> bool:
        """Whether it is."""
        return self.ratio > 1 + SAME

    @property
    def windowed(self) -> bool:
        """Whether windows are a part of it, so that it depends on the number of tokens."""
        return abs(self.windows - 1) > SAME

    @property
    def parts(self) -> str:
        """`KV heads ÷ 3, windows ÷ 4.44`; empty where one part is all of it."""
        parts = {"KV heads": self.heads, "dtype": self.dtype, "windows": self.windows}
        changed = {name: value for name, value in parts.items() if abs(value - 1) > SAME}
        return ", ".join(f"{name} {divided(value)}" for name, value in changed.items()) if len(changed) > 1 else ""


def divided(ratio: float) -> str:
    """`÷ 3`."""
    return f"÷ {fmt.plain(ratio)}"


def cache_change(
    tokens: int, size: tuple[int, int], heads: tuple[int, int], per_token: tuple[int, int] | None = None
) -> CacheChange:
    """What made a cache smaller. size: its bytes at so many tokens, before and after. heads: KV heads of a layer.
    per_token: bytes that each of the first tokens adds, which no window hides: what heads alone do not explain is the
    dtype's part. Without it values have one size.
    """
    before, after = size
    by_heads = heads[0] / heads[1]
    first = by_heads if per_token is None else per_token[0] / per_token[1]
    return CacheChange(tokens, before, after, by_heads, first / by_heads, before / after / first)


def cache_change_of(original: ModelEvaluation, final: ModelEvaluation, length: int | None) -> CacheChange | None:
    """That from one model to another at `length` tokens, else at the most that both have sizes for; None where there
    are none."""
    before, after = original.kv_cache_bytes, final.kv_cache_bytes
    common = before.keys() & after.keys()
    tokens = length if length in common else max(common, default=None)
    if tokens is None:
        return None
    size, heads = (before[tokens], after[tokens]), (original.kv_heads or 1, final.kv_heads or 1)
    first, last = original.kv_bytes_per_token, final.kv_bytes_per_token
    return cache_change(tokens, size, heads, (first, last) if first and last else None)
