"""From a run to the data of its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from retrofit import bundled
from retrofit.checkpoint.provenance import versions
from retrofit.console import jsonable
from retrofit.escape import shell_word
from retrofit.evaluation.result import EvaluationResult
from retrofit.model.source import Source
from retrofit.recipe.load import dump_recipe, load_recipe
from retrofit.recipe.schema import Recipe
from retrofit.report.data import RunData, StepRecord, Training
from retrofit.workflow.gate import gate_of
from retrofit.workflow.public import public_model, public_recipe
from retrofit.workflow.step import Inputs

if TYPE_CHECKING:
    from retrofit.recovery.report import RecoverReport
    from retrofit.workflow.context import ModelContext
    from retrofit.workflow.journal import Entry


def run_data(context: ModelContext, inputs: Inputs, entries: Mapping[str, Entry] | None = None) -> RunData:
    """Everything the run has found so far. entries: lines of its journal, by step."""
    recipe, entries = context.recipe, entries or {}
    evaluated: EvaluationResult | None = inputs.reports.get("evaluate")
    published = inputs.reports.get("publish")
    converted, windowed, extended, recovered = map(inputs.reports.get, ("convert", "window", "extend", "recover"))
    kernel = evaluated.proof.kernel if evaluated else context.kernel.name
    noted = [note for report in (converted, windowed) if report for note in report.notes]
    noted += recovered.cautions if recovered else ()
    return RunData(
        name=recipe.name,
        recipe_yaml=dump_recipe(public_recipe(recipe, context.source)),
        model=context.source.base_model or Path(recipe.model or "").name,
        created=max((entry.finished for entry in entries.values()), default=""),
        description=recipe.description,
        versions=versions(),
        models=evaluated.models if evaluated else (),
        native_length=context.native,
        claimed_length=context.claimed,
        training=tuple((at.step, at.loss, at.held_out_loss) for at in (recovered.history if recovered else ())),
        recovery=_training(recipe, recovered),
        steps=tuple(_steps(context, entries)),
        kernel=kernel,
        kernel_proof=evaluated.proof if evaluated else None,
        conversion=converted,
        windows=jsonable(windowed) if windowed else None,  # type: ignore[arg-type]
        context=extended,
        gate=gate_of(recipe, evaluated),
        reload=published.reload if published else None,
        notes=tuple(dict.fromkeys((*context.notes, *noted))),
        commands=(command(context.requested or recipe, context.source),),
    )


def command(recipe: Recipe, source: Source) -> str:
    """What to type to do the same run again; a recipe of one's own is the file that is shown beside it."""
    bundled_recipe = recipe.name in bundled.names("recipes") and load_recipe(recipe.name, model=recipe.model) == recipe
    name = recipe.name if bundled_recipe else "recipe.yaml"
    return f"retrofit run {name} --model {shell_word(public_model(source))}"


def _training(recipe: Recipe, report: RecoverReport | None) -> Training | None:
    """What the training was."""
    if report is None or recipe.recover is None:
        return None
    points = [point for point in report.history if point.step > 0]
    return Training(
        loss=recipe.recover.loss,
        steps=report.steps,
        best_step=report.best_step,
        tokens=report.tokens,
        rank=recipe.recover.adapter.rank,
        learning_rate=max((point.learning_rate for point in points), default=None),
        tokens_per_second=median(point.tokens_per_second for point in points) if points else None,
        passages=_both(report.start_passages, report.best_passages),
    )


def _both(before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if before is None or after is None else (before, after)


def _steps(context: ModelContext, entries: Mapping[str, Entry]) -> list[StepRecord]:
    """One record a step; the pieces of a step (`evaluate:original`) count towards it."""
    records = []
    for cost in context.plan.steps:
        parts = [entry for name, entry in entries.items() if name.partition(":")[0] == cost.step]
        if parts:
            records.append(
                StepRecord(
                    name=cost.step,
                    seconds=sum(entry.seconds for entry in parts),
                    peak_bytes=max(entry.peak_bytes for entry in parts),
                    predicted_seconds=cost.seconds,
                    predicted_peak_bytes=cost.peak_bytes,
                )
            )
    return records
