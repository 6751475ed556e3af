"""A run: every step of a recipe in one folder, then the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import TaskChange
from retrofit.publishing.gate import GateResult
from retrofit.recipe.load import dump_recipe
from retrofit.recipe.schema import Recipe
from retrofit.workflow import evaluation, publishing, reporting, surgery
from retrofit.workflow.journal import NAME as JOURNAL
from retrofit.workflow.journal import Journal
from retrofit.workflow.operations import Origin
from retrofit.workflow.plan import STEPS, steps_of
from retrofit.workflow.prepare import Prepared
from retrofit.workflow.public import source_record
from retrofit.workflow.runner import FINAL, Runner, State

if TYPE_CHECKING:
    from retrofit.console import Progress

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class RunResult:
    """A finished run. models: by label, what was measured. metrics: by name, as `require` knows them. task_changes: of
    each changed model against the original, on the same questions.

    final: what can be published, None without. seconds: by step. reused: steps that were done before.
    """

    folder: Path
    models: Mapping[str, Any]
    metrics: Mapping[str, float]
    gate: tuple[GateResult, ...]
    reload: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    report: Path
    final: Path | None
    reused: tuple[str, ...]
    task_changes: Mapping[str, tuple[TaskChange, ...]] = field(default_factory=dict)


def check_from_step(from_step: str | None, recipe: Recipe) -> None:
    """UserError unless `from_step` is a step of the recipe."""
    steps = steps_of(recipe)
    if from_step is not None and from_step not in steps:
        raise UserError(f"the recipe has no step `{from_step}`", where="--from", fix=f"use one of {', '.join(steps)}")


def run(prepared: Prepared, out: Path, *, from_step: str | None = None, progress: Progress | None = None) -> RunResult:
    """Do every step of a prepared recipe in the folder `out`, or find it done. from_step: do it and all after it again.

    Raises UserError when the folder is in use, and GateError when a requirement is not met: the report is written then,
    `final` is not.
    """
    again = STEPS[STEPS.index(from_step) :] if from_step else ()
    needed = prepared.plan.disk_bytes
    with folder_lock(out), _nothing_left_of_nothing(out), writing(out, needed=needed):
        out.mkdir(parents=True, exist_ok=True)
        runner = Runner(out, prepared, Journal(out), again, progress)
        runner.journal.mark()
        runner.write_own(RECIPE, dump_recipe(prepared.recipe).encode())
        states = _checkpoints(runner)
        if prepared.recipe.evaluate:
            evaluation.evaluate(runner, states, prepared.recipe.evaluate)
        gate = publishing.gate(runner)
        try:
            publishing.publish(runner, states, gate)
        finally:
            # Also when a requirement is not met: the report says which.
            report = reporting.write(runner, gate)
        return _result(runner, gate, report)


@contextmanager
def _nothing_left_of_nothing(out: Path) -> Iterator[None]:
    """A new run folder whose first step was refused is removed again, unless it holds what a later try goes on from."""
    new = not out.exists()
    try:
        yield
    except UserError:
        kept = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
        if new and {str(path.relative_to(out)) for path in kept} <= {JOURNAL, RECIPE}:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _checkpoints(runner: Runner) -> dict[str, State]:
    """The models of the run by label: the original, what surgery made of it, and what recovery made of that."""
    recipe, source = runner.prepared.recipe, runner.prepared.source
    state = State(source.folder, dict(source.digests), Origin(source_record(source)))
    states = {"original": state}
    if recipe.convert:
        state = surgery.convert(runner, state, recipe.convert)
    if recipe.context:
        state = surgery.extend(runner, state, recipe.context)
    if recipe.convert or recipe.context:
        states["converted" if recipe.convert else "extended"] = state
    if recipe.recover:
        states["recovered"] = surgery.recover(runner, state, recipe.recover)
    return states


def _result(runner: Runner, gate: tuple[GateResult, ...], report: Path) -> RunResult:
    evaluated: Any = runner.entries["evaluate"].result if "evaluate" in runner.entries else {}
    published: Any = runner.entries["publish"].result if "publish" in runner.entries else {}
    final = runner.folder / FINAL
    return RunResult(
        folder=runner.folder,
        models=evaluated.get("models", {}),
        metrics=evaluated.get("metrics", {}),
        gate=gate,
        reload=published.get("reload"),
        seconds={name: entry.seconds for name, entry in runner.entries.items()},
        report=report,
        final=final if final.exists() else None,
        reused=tuple(runner.reused),
        task_changes={
            label: tuple(TaskChange(**row) for row in rows)
            for label, rows in evaluated.get("tasks", {}).get("changes", {}).items()
        },
    )
