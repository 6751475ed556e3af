"""Rows of a training step where a recipe does not say: one, and in several processes one for each.

A training keeps the number that it was begun with: another number of processes resumes the same one.
"""

from __future__ import annotations

from pathlib import Path

from retrofit.recipe.load import validate
from retrofit.recipe.schema import Recipe, Recover
from retrofit.system.work_folder import remembered
from retrofit.workflow.outputs import recorded_step, work_folder


def default_rows(recipe: Recipe, processes: int) -> int:
    """A row for each process, or each group of them that shares rows."""
    return 1 if recipe.recover is None else max(1, processes // recipe.recover.distribute.sequence)


def begun_alone(out: Path, *, overwrite: bool = False) -> int | None:
    """Rows of a step of the training that `retrofit recover --out OUT` has begun or finished; None where it has not.

    overwrite: what is finished will be replaced, and does not count.
    """
    finished = None if overwrite else recorded_step(out, "recover")
    rows = remembered(work_folder(out), "recover") if finished is None else finished.get("batch_size")
    return int(rows) if isinstance(rows, int) or (rows and rows.isdecimal()) else None


def with_rows(recipe: Recipe, processes: int, begun: int | None = None) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a number of rows for so many processes, and a note, where it leaves `recover.batch_size` open.

    begun: the rows of the training that it resumes. Raises RecipeError where the tokens do not suffice for one step.
    """
    rows = default_rows(recipe, processes) if begun is None else begun
    section = recipe.recover
    if section is None or "batch_size" in section.model_fields_set or rows == section.batch_size:
        return recipe, ()
    given = {name: getattr(section, name) for name in section.model_fields_set}
    section = validate({**given, "batch_size": rows}, Recover, f"recover, with batch_size: {rows}")
    why = "a row for each process" if begun is None else "with which the training was begun"
    return recipe.model_copy(update={"recover": section}), (f"recover.batch_size: {rows}, {why}",)
