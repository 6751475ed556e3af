"""What must hold before tasks of lm-evaluation-harness are asked."""

from __future__ import annotations

from typing import Any

from retrofit.errors import UserError
from retrofit.evaluation.scoring.reader import varying
from retrofit.evaluation.tasks.harness import Harness
from retrofit.recipe.schema import Recipe


def check_tasks(recipe: Recipe, harness: Harness, config: Any, kernel: str) -> None:
    """UserError for what would fail later: a batch that the kernel or the positions do not allow, and requirements on
    tasks or metrics that are not asked for. config: of the model; kernel: what it will be read with."""
    section = recipe.evaluate.tasks if recipe.evaluate else None
    assert section
    if section.batch_size > 1:
        generating = next((asked.name for asked in harness.tasks if asked.generated), None)
        reason = None
        if varying(config.get_text_config()):
            reason = "the positions of this model change with the length, and those of a batch are padded to one length"
        elif generating and kernel == "blockwise":
            reason = f"`{generating}` generates text, and the blockwise kernel cannot read padding in front of it"
        if reason:
            raise UserError(reason, where="evaluate.tasks.batch_size", fix="write batch_size: 1")
    known = {asked.name: asked for asked in harness.tasks}
    for key in recipe.require:
        measure, _, name = key.partition("@")
        if measure not in ("task", "task_drop"):
            continue
        name, _, metric = name.partition("/")
        if name not in known:
            raise UserError(
                f"no task `{name}` is asked", where=f"require.{key}", fix=f"use one of {', '.join(sorted(known))}"
            )
        metrics = known[name].metrics
        if metric and metric.partition(",")[0] not in metrics:
            raise UserError(
                f"the task `{name}` has no metric `{metric}`",
                where=f"require.{key}",
                fix=f"use one of {', '.join(metrics)}",
            )
