"""What a budget can be met with: KV heads, windows and cache types of one model, and whether they suffice."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.budget.rows import ORIGINAL, BudgetRow, best
from retrofit.errors import UserError
from retrofit.format import nbytes, nbytes_at_least
from retrofit.model.cache_dtype import AUTO, CACHE_DTYPES, cache_bytes, unstorable
from retrofit.model.families import family_of
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.kv_budget import Budget
from retrofit.recipe.layers import how_many
from retrofit.recipe.schema import Window
from retrofit.windows.price_list import fewest_full, sizes_within
from retrofit.workflow.windowing import length_of, target_of

if TYPE_CHECKING:
    from retrofit.windows.targets import Target


@dataclass(frozen=True)
class Choices:
    """counts: of KV heads, the model's own among them. target: None where the architecture holds no windows by layer.
    dtypes: cache types, "auto" first. notes: why there is less than there could be."""

    counts: tuple[int, ...]
    target: Target | None
    dtypes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def candidates(self) -> tuple[int, ...]:
        """Layers that can get a window, and have none."""
        return self.target.candidates if self.target else ()

    def windowed(self, full: Collection[int]) -> frozenset[int]:
        """Layers that get a window where the layers `full` see everything: those whose window becomes shorter too."""
        always = self.target.always if self.target else ()
        return frozenset((*self.candidates, *always)) - frozenset(full)


def choices(section: Window, config: Any, spec: AttentionSpec) -> Choices:
    """What there is to choose from. section: of the windows."""
    notes = []
    counts = tuple(one.kv_heads for one in family_of(config).conversions(spec) if one.possible)
    if len(counts) < 2:
        notes.append("no fewer KV heads in the list: the model can have none")
    target = None
    try:
        target = target_of(section, config, spec)
    except UserError as error:
        notes.append(f"no windows in the list: {error.what}")
    if target is not None and not target.candidates:
        target = None
        notes.append("no windows in the list: every layer has one already")
    reasons = {name: unstorable(spec, name) for name in CACHE_DTYPES}
    notes += [f"no cache of {name} in the list: {reason}" for name, reason in reasons.items() if reason]
    dtypes = (AUTO, *(name for name, reason in reasons.items() if reason is None))
    return Choices(counts or (spec.layers[0].kv_heads,), target, dtypes, tuple(notes))


def require_possible(
    budget: Budget, section: Window, native: int, spec: AttentionSpec, found: Choices, value_bytes: int
) -> None:
    """UserError where the fewest heads, the shortest windows in as many layers as the list could have, and the smallest
    type together do not meet the budget. section: of the windows. native: the model's positions."""
    least = spec.with_kv_heads(min(found.counts))
    if found.target is not None:
        few = fewest_full(len(spec.layers), how_many(section.full_layers, len(spec.layers)))
        sizes = sizes_within(length_of(section, native), section.size, spec)
        least = least.with_windows(sizes[0], found.windowed(found.candidates[:few]))

    def size(tokens: int) -> int:
        return min(cache_bytes(least, tokens, name, value_bytes) for name in found.dtypes)

    if size(budget.length) > budget.nbytes:
        tokens = bisect.bisect_right(range(budget.length), budget.nbytes, key=size) - 1
        shorter = f", or ask for at most {tokens:,} tokens" if tokens > 0 else ""
        raise _unmet(budget, size(budget.length), "nothing in the list can be so small", shorter)


def meeting(budget: Budget, rows: Sequence[BudgetRow], answer_weight: float) -> list[BudgetRow]:
    """The rows that meet the budget, the one that loses least first. Raises UserError where there is none."""
    found = best(rows, budget, answer_weight)
    if not found:
        raise _unmet(budget, min(row.nbytes for row in rows), "no row of the list meets it")
    return found


def _unmet(budget: Budget, least: int, why: str, shorter: str = "") -> UserError:
    return UserError(
        f"{why}: the smallest KV cache is {nbytes(least)} at {budget.length:,} tokens",
        where=f"the budget of {nbytes(budget.nbytes)} at {budget.length:,} tokens",
        fix=f"allow {nbytes_at_least(least)}@{budget.length}{shorter}",
    )


def commands(row: BudgetRow, model: str, options: str = "") -> tuple[str, ...]:
    """What to type for a row, and how the result is served. model: its name in a command, with its revision. options:
    of both conversions."""
    lines, out = [], "out/"
    if row.heads.how != ORIGINAL:
        out += f"kv{row.heads.kv_heads}"
        lines.append(f"retrofit convert {model} --kv-heads {row.heads.kv_heads}{options} --out {out}")
        model = out
    if row.windows.how != ORIGINAL:
        full = ",".join(map(str, row.windows.full_layers)) + ("," if len(row.windows.full_layers) == 1 else "")
        out += f"{'-' if lines else ''}window{row.windows.size}"
        size = f"--size {row.windows.size} --full-layers {full or 0}"
        lines.append(f"retrofit window {model} {size}{options} --out {out}")
    if row.stored.cache_dtype != AUTO:
        lines.append(f"served by {CACHE_DTYPES[row.stored.cache_dtype].engine}")
    return tuple(lines)
