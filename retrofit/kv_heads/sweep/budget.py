"""A KV-cache budget, `2GiB@32k`: so many bytes for one sequence of so many tokens. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from retrofit.errors import UserError
from retrofit.format import heads, nbytes

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|[KMGT]i?B)\s*@\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TOKENS = {"": 1, "k": 1024, "m": 1 << 20}


@dataclass(frozen=True)
class Budget:
    """`nbytes` bytes of KV cache for one sequence of `length` tokens."""

    nbytes: int
    length: int


def parse_budget(text: str) -> Budget:
    """`2GiB@32k`: decimal (GB) or binary (GiB) bytes, tokens with k for 1,024. Raises UserError for anything else."""
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise UserError(
            f"`{text}` is not a KV-cache budget", where="--kv-budget", fix="write BYTES@TOKENS, for example 2GiB@32k"
        )
    size, unit, tokens, factor = match.groups()
    budget = Budget(int(float(size) * _UNITS[unit]), int(float(tokens) * _TOKENS[factor.lower()]))
    if not budget.nbytes or not budget.length:
        raise UserError(
            "a budget of no bytes, or for no tokens, fits nothing",
            where=f"--kv-budget {text}",
            fix="write for example 2GiB@32k",
        )
    return budget


def within(budget: Budget, caches: Mapping[int, int]) -> int:
    """The most KV heads whose cache fits. caches: bytes at the budget's length by number of KV heads.

    Raises UserError where not even the fewest fit, and where the model fits as it is.
    """
    fewest, own = min(caches), max(caches)
    where = f"--kv-budget {nbytes(budget.nbytes)} at {budget.length:,} tokens"
    if caches[own] <= budget.nbytes:
        raise UserError(
            f"the model is inside this budget as it is: its {heads(own)} need {nbytes(caches[own])}",
            where=where,
            fix=f"convert nothing, or name a budget below {nbytes(caches[own])}",
        )
    if caches[fewest] > budget.nbytes:
        tokens = budget.length * budget.nbytes // caches[fewest]
        raise UserError(
            f"even {heads(fewest)} need{'s' if fewest == 1 else ''} {nbytes(caches[fewest])}",
            where=where,
            fix=f"allow {nbytes(caches[fewest])}" + (f", or about {tokens:,} tokens" if tokens else ""),
        )
    return max(count for count, size in caches.items() if size <= budget.nbytes)
