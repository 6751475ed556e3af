"""What holds for every run, whatever its steps: the stored configuration, the weights' headers, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from retrofit.checkpoint.config import read_config
from retrofit.checkpoint.files import holds_weights
from retrofit.context import rope
from retrofit.errors import UserError
from retrofit.format import nbytes
from retrofit.system.memory import total_memory

if TYPE_CHECKING:
    from retrofit.data.documents import Document
    from retrofit.model.folder import ModelFolder
    from retrofit.recipe.schema import Evaluate
    from retrofit.workflow.estimate.cost import Cost

_SURE = 2
"""A step is refused when its estimate is so many times the memory of the machine: estimates are no measurements."""


def check_positions(model: ModelFolder) -> tuple[str, ...]:
    """Notes on the position encoding of a model; UserError for one that is broken.

    The linter reads config.json as it is stored, where a gap is still seen, and what became of it.
    """
    notes = []
    stored = [*rope.recorded(model.path, model.config), *rope.lint(read_config(model.path), model.config)]
    known = {(finding.rule, finding.where) for finding in stored}
    loaded = [finding for finding in rope.lint(model.config) if (finding.rule, finding.where) not in known]
    for finding in (*stored, *loaded):
        if finding.severity == "error":
            raise UserError(finding.what, where=f"config.json: {finding.where}", fix=finding.fix)
        notes.append(f"{finding.where}: {finding.what}")
    return tuple(notes)


def check_headers(model: ModelFolder, *, by_name: bool) -> bool:
    """Whether the folder holds weights already; they are checked then, by their headers alone. Raises UserError for
    weights that are not what the configuration says. by_name: a step finds tensors by their names."""
    if not holds_weights(model.path):
        return False
    from retrofit.model.completeness import require_complete

    require_complete(model.checkpoint, model.config, model.spec if by_name else None)
    return True


def check_memory(costs: Iterable[Cost], device: str) -> tuple[str, ...]:
    """A note on every step that needs more memory than there is; UserError where it is certain that it has no room."""
    total = total_memory(device)
    if total is None:
        return ()
    notes = []
    for cost in costs:
        if cost.peak_bytes > _SURE * total:
            raise UserError(
                f"`{cost.step}` needs about {nbytes(cost.peak_bytes)} of memory, and this machine has {nbytes(total)}",
                where=cost.step,
                fix="ask for fewer tokens, shorter lengths or smaller batches, or use a larger machine",
            )
        if cost.peak_bytes > total:
            notes.append(
                f"`{cost.step}` may need {nbytes(cost.peak_bytes)} of memory; this machine has {nbytes(total)}"
            )
    return tuple(notes)


def require_within(length: int, claimed: int, where: str, *, extendable: bool = True) -> None:
    """UserError where `length` tokens are more than the model has positions."""
    if length > claimed:
        longer = f", or extend the model with `context: {{length: {length}}}`" if extendable else ""
        raise UserError(
            f"{length} tokens are more than the {claimed} positions of the model",
            where=where,
            fix=f"ask for at most {claimed}{longer}",
        )


def require_prose(section: Evaluate, documents: Sequence[Document]) -> None:
    """UserError where what is asked of long contexts is asked of dialogues alone."""
    asked = {
        "context_gain": section.context_gain,
        "long_ppl": section.long_ppl,
        "definitions": section.definitions,
        "needle": section.needle,
    }
    first = next((name for name, value in asked.items() if value), None)
    if first is not None and not documents:
        raise UserError(
            "dialogues are read one by one, and say nothing of long contexts",
            where=f"evaluate.{first}",
            fix="leave it out, or name a text beside the dialogues",
        )
