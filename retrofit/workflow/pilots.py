"""Rows of a budget's list, measured: really converted, on little text and in a folder that is removed again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.budget.measure import losses_on
from retrofit.budget.rows import ORIGINAL, BudgetRow, Loss
from retrofit.console import jsonable
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Recipe
from retrofit.system.resume import Kept
from retrofit.workflow.command import write
from retrofit.workflow.joining import await_folder
from retrofit.workflow.windowing import least_tokens, length_of

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.windows.rows import Repeats
    from retrofit.workflow.context import ModelContext


def measured(
    rows: Sequence[BudgetRow],
    recipe: Recipe,
    context: ModelContext,
    text: Repeats,
    before: Loss,
    store: Kept,
    work: Path,
    *,
    tokens: int,
    revision: str | None,
    progress: Progress | None,
) -> list[BudgetRow]:
    """The rows with what they lose together; those that were measured are as they were. All processes of the context
    make this call.

    text: rows to measure on, before: the original's losses on them. store: where results are kept. work: a folder for
    the checkpoints; the caller removes it. tokens: of the heads' calibration; windows read as few as they can.
    """
    found, world = [], context.world
    for row in rows:
        if row.measured is None:
            full = "-".join(map(str, row.windows.full_layers))
            name = f"pilot-{row.heads.kv_heads}-{row.windows.size}-{full}"
            key = f"{name}-{row.stored.cache_dtype}"
            known: Any = store.values([key]).get(key)
            if known is None:
                folder = _converted(row, recipe, context, work / name, tokens, revision, progress)
                cache, device = row.stored.cache_dtype, context.device
                known = jsonable(losses_on(folder, text, cache, device=device, world=world))
                if world.main:
                    store.put_values(key, known)
            row = replace(row, measured=Loss(**known) - before)
        found.append(row)
    world.wait()
    if world.main:
        shutil.rmtree(work, ignore_errors=True)
    return found


def _converted(
    row: BudgetRow,
    recipe: Recipe,
    context: ModelContext,
    work: Path,
    tokens: int,
    revision: str | None,
    progress: Progress | None,
) -> ModelFolder:
    """The checkpoint of a row: heads first, as in a recipe; what was written before is kept."""
    usual: Any = {"world": context.world, "progress": progress}
    if context.world.main:
        work.mkdir(parents=True, exist_ok=True)
    alone = recipe.model_copy(update=dict.fromkeys(("convert", "window", "context", "recover", "evaluate", "publish")))
    made: Path | None = None
    if row.heads.how != ORIGINAL:
        assert recipe.convert
        calibration = recipe.convert.calibration.model_copy(update={"tokens": tokens})
        section = recipe.convert.model_copy(update={"kv_heads": row.heads.kv_heads, "calibration": calibration})
        made = work / "heads"
        write(alone.model_copy(update={"convert": section}), made, revision=revision, **usual)
    if row.windows.how != ORIGINAL:
        assert recipe.window
        window = recipe.window.model_copy(
            update={"size": row.windows.size, "full_layers": row.windows.full_layers or 0}
        )
        # As long as the list's own sequences, of which every size that it prices fits twice.
        length = length_of(recipe.window, context.native)
        update = {"sequence_length": length, "tokens": least_tokens(window, length)}
        reading = window.calibration.model_copy(update=update)
        given: dict[str, Any] = {"window": window.model_copy(update={"calibration": reading})}
        # What was made here has no revision.
        given |= {"model": str(made), "revision": None} if made else {}
        pinned, made = (None if made else revision), work / "windows"
        write(alone.model_copy(update=given), made, revision=pinned, **usual)
    assert made is not None
    await_folder(made)
    return ModelFolder(made)
