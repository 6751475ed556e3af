"""Rows of a training step where a recipe does not say: one, and in several processes one for each.

A run keeps the number that it was begun with: another number of processes resumes the same training.
"""

from __future__ import annotations

from pathlib import Path

from retrofit.recipe.load import validate
from retrofit.recipe.schema import Recipe, Recover
from retrofit.workflow.journal import begun_rows


def default_rows(recipe: Recipe, processes: int) -> int:
    """A row for each process, or each group of them that shares rows."""
    return 1 if recipe.recover is None else max(1, processes // recipe.recover.distribute.sequence)


def with_rows(recipe: Recipe, processes: int, run: Path | None = None) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a number of rows for so many processes, and a note, where it leaves `recover.batch_size` open.

    run: the folder of a run, which may have begun. Raises RecipeError where the tokens do not suffice for one step.
    """
    begun = None if run is None else begun_rows(run)
    rows = default_rows(recipe, processes) if begun is None else begun
    section = recipe.recover
    if section is None or "batch_size" in section.model_fields_set or rows == section.batch_size:
        return recipe, ()
    given = {name: getattr(section, name) for name in section.model_fields_set}
    section = validate({**given, "batch_size": rows}, Recover, f"recover, with batch_size: {rows}")
    note = (
        f"recover.batch_size: {rows}, a row for each process that the run {'is' if begun is None else 'was'} begun on"
    )
    return recipe.model_copy(update={"recover": section}), (note,)
