"""From the entries of a run to the data of its report."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from retrofit import bundled
from retrofit.checkpoint.provenance import versions
from retrofit.console import jsonable
from retrofit.escape import shell_word
from retrofit.evaluation.continuations import Continuation
from retrofit.evaluation.cost import RunCost
from retrofit.evaluation.metrics.context_use import restored
from retrofit.evaluation.metrics.effective import ShortContext
from retrofit.evaluation.metrics.perplexity import Row
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
from retrofit.model.source import Source
from retrofit.recipe.load import dump_recipe, load_recipe
from retrofit.recipe.schema import Recipe
from retrofit.report.data import ModelResult, RunData, StepRecord, loss_by_position
from retrofit.report.render import files
from retrofit.workflow.evaluation import losses_file
from retrofit.workflow.plan import STEPS
from retrofit.workflow.public import public_model, public_recipe
from retrofit.workflow.runner import Runner

if TYPE_CHECKING:
    from retrofit.publishing.gate import GateResult


def write(runner: Runner, results: tuple[GateResult, ...]) -> Path:
    """Write report.html and report.md (and the chart) into the run folder; returns report.html."""
    for name, content in files(run_data(runner, results)).items():
        runner.write_own(name, content)
    return runner.folder / "report.html"


def run_data(runner: Runner, results: tuple[GateResult, ...]) -> RunData:
    """Everything the run has found so far."""
    prepared, recipe, entries = runner.prepared, runner.prepared.recipe, runner.entries
    found: dict[str, Any] = {name: dict(entry.result) for name, entry in entries.items()}
    evaluated = found.get("evaluate", {})
    conversion, context = found.get("convert"), found.get("extend")
    proof = evaluated.get("proof")
    return RunData(
        name=recipe.name,
        recipe_yaml=dump_recipe(public_recipe(recipe, prepared.source)),
        model=prepared.source.base_model or Path(recipe.model or "").name,
        created=max((entry.finished for entry in entries.values()), default=""),
        description=recipe.description,
        versions=versions(),
        models=tuple(_model(runner, label, value, evaluated) for label, value in evaluated.get("models", {}).items()),
        native_length=prepared.plan.positions[0],
        claimed_length=prepared.plan.positions[1],
        training=_training(found.get("recover", {})),
        recovery=_recovery(recipe, found.get("recover")),
        steps=tuple(_steps(runner)),
        kernel=proof["kernel"] if proof else prepared.kernel.name,
        kernel_proof=proof,
        conversion=conversion,
        context=context,
        gate=tuple(_dicts(results)),
        reload=found.get("publish", {}).get("reload"),
        notes=tuple(dict.fromkeys((*prepared.notes, *_notes(conversion), *_notes(found.get("recover"))))),
        commands=(command(recipe, prepared.source),),
    )


def command(recipe: Recipe, source: Source) -> str:
    """What to type to do the same run again; a recipe of one's own is the file that is shown beside it."""
    bundled_recipe = recipe.name in bundled.names("recipes") and load_recipe(recipe.name, model=recipe.model) == recipe
    name = recipe.name if bundled_recipe else "recipe.yaml"
    return f"retrofit run {name} --model {shell_word(public_model(source))}"


def _notes(result: dict[str, Any] | None) -> list[str]:
    """What a step did not do as asked; how training went about it is no such thing."""
    return [note for note in (result or {}).get("notes", ()) if not note.startswith(("training in", "going on from"))]


def _dicts(results: tuple[GateResult, ...]) -> list[dict[str, Any]]:
    listed = jsonable(results)
    assert isinstance(listed, list)
    return listed


def _model(runner: Runner, label: str, value: dict[str, Any], evaluated: dict[str, Any]) -> ModelResult:
    losses = TokenLosses.load(losses_file(runner.folder, label))
    cost = value["cost"]
    return ModelResult(
        label=label,
        rows=tuple(Row(**row) for row in value["rows"]),
        position_losses=loss_by_position(losses.losses),
        kv_bytes_per_token=value["kv_bytes_per_token"],
        kv_cache_bytes={int(tokens): size for tokens, size in value["kv_cache_bytes"].items()},
        cost=TypeAdapter(RunCost).validate_python(cost) if cost else None,
        kv_heads=value["kv_heads"],
        long_context=restored(value["long_context"]),
        short_context=tuple(ShortContext(**row) for row in evaluated["short_context"].get(label, ())),
        tasks=tuple(TaskScore(**row) for row in evaluated["tasks"]["scores"].get(label, ())),
        task_changes=tuple(TaskChange(**row) for row in evaluated["tasks"]["changes"].get(label, ())),
        continuations=tuple(Continuation(**one) for one in value["continuations"]),
    )


def _training(result: dict[str, Any]) -> tuple[tuple[int, float | None, float | None], ...]:
    return tuple((point["step"], point.get("loss"), point.get("held_out_loss")) for point in result.get("history", ()))


def _recovery(recipe: Recipe, result: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the training was and how fast: the highest learning rate of its schedule, the median step's tokens/s."""
    if result is None or recipe.recover is None:
        return None
    steps = [point for point in result.get("history", ()) if point["step"] > 0]
    return {
        "loss": recipe.recover.loss,
        "steps": result["steps"],
        "tokens": result["tokens"],
        "rank": recipe.recover.adapter.rank,
        "learning_rate": max((point["learning_rate"] for point in steps), default=None),
        "tokens_per_second": median(point["tokens_per_second"] for point in steps) if steps else None,
    }


def _steps(runner: Runner) -> list[StepRecord]:
    """One record a step; the pieces of a step (`evaluate:original`) count towards it."""
    records = []
    for step in STEPS:
        parts = [entry for name, entry in runner.entries.items() if name.partition(":")[0] == step]
        if not parts:
            continue
        planned = runner.prepared.plan.of(step)
        records.append(
            StepRecord(
                name=step,
                seconds=sum(entry.seconds for entry in parts),
                peak_bytes=max(entry.peak_bytes for entry in parts),
                predicted_seconds=planned.seconds if planned else None,
                predicted_peak_bytes=planned.peak_bytes if planned else None,
            )
        )
    return records
