"""The most KV heads that meet a budget. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from retrofit.errors import UserError
from retrofit.format import heads, nbytes
from retrofit.recipe.kv_budget import Budget


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
