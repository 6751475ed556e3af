"""What a budget can be met with: KV heads, windows and cache types of one model, and whether they suffice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.budget.rows import ORIGINAL, BudgetRow, best
from retrofit.errors import UserError
from retrofit.format import nbytes
from retrofit.model.cache_dtype import AUTO, CACHE_DTYPES, cache_bytes, unstorable
from retrofit.model.families import family_of
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.kv_budget import Budget
from retrofit.recipe.schema import Window
from retrofit.workflow.windowing import target_of

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
        """Layers that can get a window."""
        return self.target.candidates if self.target else ()


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


def require_possible(budget: Budget, spec: AttentionSpec, found: Choices, value_bytes: int) -> None:
    """UserError where the fewest heads, one full layer and the smallest type together do not meet the budget."""
    least = spec.with_kv_heads(min(found.counts))
    if found.candidates:
        least = least.with_windows(1, set(found.candidates[1:]))
    size = min(cache_bytes(least, budget.length, name, value_bytes) for name in found.dtypes)
    if size > budget.nbytes:
        raise _unmet(budget, size, "nothing in the list can be so small")


def meeting(budget: Budget, rows: Sequence[BudgetRow], answer_weight: float) -> list[BudgetRow]:
    """The rows that meet the budget, the one that loses least first. Raises UserError where there is none."""
    found = best(rows, budget, answer_weight)
    if not found:
        raise _unmet(budget, min(row.nbytes for row in rows), "no row of the list meets it")
    return found


def _unmet(budget: Budget, least: int, why: str) -> UserError:
    tokens = budget.length * budget.nbytes // least
    return UserError(
        f"{why}: the smallest KV cache is {nbytes(least)} at {budget.length:,} tokens",
        where=f"--kv-budget {nbytes(budget.nbytes)} at {budget.length:,} tokens",
        fix=f"allow {nbytes(least)}" + (f", or about {tokens:,} tokens" if tokens else ""),
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
