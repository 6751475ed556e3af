"""`retrofit plan --kv-budget`: what is shown of the list of a budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrofit.budget.rows import best
from retrofit.format import heads, nbytes
from retrofit.model.inspect import ranges
from retrofit.tables import NOTE, Part, Table

if TYPE_CHECKING:
    from retrofit.budget.rows import BudgetList, BudgetRow, Loss

SHOWN = 3
"""Rows that lose least and meet the budget, whose commands are shown; there can be fifty rows."""


def budget(result: BudgetList) -> Iterator[Part]:
    """The rows, what they come from, and what is recommended."""
    limit, length = result.budget.nbytes, result.budget.length
    at = f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
    rows = [
        (
            number,
            row.heads.kv_heads,
            "none" if row.windows.size is None else f"{row.windows.size:,}",
            "all" if row.windows.size is None else ranges(row.windows.full_layers) or "none",
            row.stored.cache_dtype,
            nbytes(row.nbytes),
            "yes" if row.nbytes <= limit else "no",
            _losses(row.predicted),
            row.how,
            _losses(row.measured) if row.measured and row.surgery else "",
        )
        for number, row in enumerate(result.rows)
    ]
    yield Table(
        f"{result.model}: what meets {nbytes(limit)} at {length:,} tokens, and what it loses (text / answers)",
        ["row", "KV heads", "window", "full layers", "cache", f"KV at {at}", "fits", "loss", "", "measured together"],
        rows,
    )
    yield (
        "nats per token beyond the original's, of text beyond the window and of passages out of sight, before any "
        f"training, on {result.tokens:,} tokens of {', '.join(result.kinds)}; a prediction is the sum of what the "
        f"parts of a row lose alone; rows are compared by text + {result.answer_weight:g} x answers"
    )
    for note in result.notes:
        yield f"{NOTE}{note}"
    first = best(result.rows, result.budget, result.answer_weight)[:SHOWN]
    for number, row in enumerate(result.rows):
        if row in first and row.commands and row != result.recommended:
            yield f"row {number}:\n" + "\n".join(f"  {line}" for line in row.commands)
    yield "the commands of every row: --json"
    yield _recommendation(result)


def _losses(loss: Loss) -> str:
    return f"{loss.text:+.3f} / {loss.answers:+.3f}"


def _recommendation(result: BudgetList) -> str:
    row = result.recommended
    if row is None:
        return "\nnothing is recommended: the best rows were not measured, and a prediction is no measurement"
    if not row.parts:
        return "\nrecommended: nothing; the model meets the budget as it is"
    what = f"\nrecommended: {_named(row)}, {nbytes(row.nbytes)}, {_losses(row.loss)} measured"
    if not row.surgery:
        return f"{what}; no surgery is the best answer\n  {row.commands[-1]}"
    return f"{what}, before any training\n" + "\n".join(f"  {line}" for line in row.commands)


def _named(row: BudgetRow) -> str:
    parts = [heads(row.heads.kv_heads)]
    if row.windows.size is not None:
        but = f" but {ranges(row.windows.full_layers)}" if row.windows.full_layers else ""
        parts.append(f"windows of {row.windows.size:,} tokens in all layers{but}")
    if row.stored.how != "original":
        parts.append(f"a cache of {row.stored.cache_dtype}")
    return ", ".join(parts)
