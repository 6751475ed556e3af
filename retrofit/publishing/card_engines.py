"""What a model card says of the engines that people serve a checkpoint with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retrofit.escape import Markdown, table_row

if TYPE_CHECKING:
    from retrofit.context.engines import Tried
    from retrofit.publishing.engines.trial import EngineTrial

_VERDICTS = {
    "same": "computes the same",
    "differs": "computes something else",
    "error": "does not load it",
    "proves nothing": "not known",
    "not tried": "not tried",
}


def scored_sentence(trials: Sequence[EngineTrial]) -> str:
    """How this folder was tried."""
    if not trials:
        return ""
    first = trials[0]
    return (
        f"This folder was scored by each of these, in a process of its own: {first.positions} positions of held-out "
        f"documents of up to {first.tokens:,} tokens, their first and last among them. Differences of "
        f"log-probabilities from transformers {first.reference} in float32, in nats; a model with its "
        f"{first.control_name} would be {first.control:.2g} away."
    )


def trial_table(trials: Sequence[EngineTrial]) -> list[Markdown]:
    """A row an engine."""
    if not trials:
        return []
    lines = [table_row(["engine", "version", "largest", "mean", "same next token", "note"])]
    lines.append(Markdown("|---|---|---:|---:|---:|---|"))
    for one in trials:
        numbers = [f"{one.largest:.2g}", f"{one.mean:.2g}", f"{100 * one.greedy:.1f}%"]
        lines.append(table_row([one.engine, one.version, *numbers, "; ".join(one.notes)]))
    return lines


def tried_table(tried: Sequence[Tried]) -> list[Markdown]:
    """A row a release of an engine."""
    if not tried:
        return []
    lines = [table_row(["engine", "version", "result", "difference", "note"]), Markdown("|---|---|---|---:|---|")]
    for one in tried:
        far = "" if one.difference is None else f"{one.difference:.1g} ({one.control or 0:.2g})"
        lines.append(table_row([one.engine, one.version, _VERDICTS[one.verdict], far, one.message]))
    return lines
