"""A run: every step of a recipe in one folder, then the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.errors import GateError, UserError
from retrofit.evaluation.result import ModelEvaluation
from retrofit.publishing.gate import GateResult, enforce
from retrofit.publishing.reload import ReloadReport
from retrofit.recipe.load import dump_recipe
from retrofit.recipe.schema import Recipe
from retrofit.report.render import files
from retrofit.system.world import Others, led
from retrofit.workflow.context import ModelContext
from retrofit.workflow.gate import gate_of
from retrofit.workflow.joining import taking_part
from retrofit.workflow.journal import FINAL, Journal
from retrofit.workflow.journal import NAME as JOURNAL
from retrofit.workflow.reporting import run_data
from retrofit.workflow.rows import default_rows
from retrofit.workflow.runner import Runner
from retrofit.workflow.step import Inputs
from retrofit.workflow.steps import steps_of

RECIPE, REPORT = "recipe.yaml", "report.html"


@dataclass(frozen=True)
class RunResult:
    """A finished run. models: by label, what was measured. metrics: by name, as `require` knows them.

    final: what can be published, None without. refused: the last step's checkpoint, where a requirement is not met.
    seconds: by step. reused: steps that were done before.
    """

    folder: Path
    models: Mapping[str, ModelEvaluation]
    metrics: Mapping[str, float]
    gate: tuple[GateResult, ...]
    reload: ReloadReport | None
    seconds: Mapping[str, float]
    report: Path
    final: Path | None
    refused: Path | None = None
    reused: tuple[str, ...] = field(default=())


def check_from_step(from_step: str | None, recipe: Recipe) -> None:
    """UserError unless `from_step` is a step of the recipe."""
    names = [step.name for step in steps_of(recipe)]
    if from_step is not None and from_step not in names:
        raise UserError(f"the recipe has no step `{from_step}`", where="--from", fix=f"use one of {', '.join(names)}")


def run(context: ModelContext, out: Path, *, from_step: str | None = None) -> RunResult:
    """Do every step of an opened recipe in the folder `out`, or find it done. from_step: do it and all after it again.

    Raises UserError when the folder is in use, and GateError, with the result, when a requirement is not met: the
    report is written then, `final` is not, and the checkpoint stays in its step's folder. In several processes rank 0
    has the folder, and all return its result.
    """
    return led(context.world, lambda others: _run(context, out, from_step, others), taking_part(context))


def _run(context: ModelContext, out: Path, from_step: str | None, others: Others) -> RunResult:
    names = [step.name for step in context.steps]
    again = tuple(names[names.index(from_step) :]) if from_step else ()
    needed = context.plan.disk_bytes
    with folder_lock(out), _nothing_left_of_nothing(out), writing(out, needed=needed):
        out.mkdir(parents=True, exist_ok=True)
        runner = Runner(out, context, Journal(out), others, again)
        runner.journal.mark(default_rows(context.recipe, context.world.size))
        runner.write_own(RECIPE, dump_recipe(context.recipe).encode())
        inputs = Inputs({"original": context.artifact()})
        for step in context.steps:
            if not step.gated:
                inputs = runner.do(step, inputs)
        try:
            inputs = _publish(runner, inputs)
        except GateError as error:
            error.result = _result(runner, inputs)
            raise
        finally:
            # Also when a requirement is not met: the report says which.
            for name, content in files(run_data(context, inputs, runner.entries)).items():
                runner.write_own(name, content)
        return _result(runner, inputs)


def _publish(runner: Runner, inputs: Inputs) -> Inputs:
    """Write `final/`, if the recipe publishes and its requirements are met. Raises GateError when they are not."""
    context = runner.context
    gate = gate_of(context.recipe, inputs.reports.get("evaluate"))
    steps = [step for step in context.steps if step.gated]
    if not steps or not all(result.passed for result in gate):
        runner.drop(FINAL)
    checkpoint = _checkpoint(inputs)
    enforce(
        gate,
        where=f"require, in {runner.folder / RECIPE}",
        kept=(
            f"the report: {runner.folder / REPORT}",
            *([f"the checkpoint that was refused, whole: {checkpoint}"] if checkpoint else []),
        ),
    )
    for step in steps:
        try:
            inputs = runner.do(step, inputs)
        except GateError:  # of an engine, which is tried last
            runner.drop(FINAL)
            raise
    return inputs


@contextmanager
def _nothing_left_of_nothing(out: Path) -> Iterator[None]:
    """A new run folder whose first step was refused is removed again, unless it holds what a later try resumes from."""
    new = not out.exists()
    try:
        yield
    except UserError:
        kept = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
        if new and {str(path.relative_to(out)) for path in kept} <= {JOURNAL, RECIPE}:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _checkpoint(inputs: Inputs) -> Path | None:
    """What the last step wrote; None where no step wrote one."""
    return inputs.current.path if len(inputs.models) > 1 else None


def _result(runner: Runner, inputs: Inputs) -> RunResult:
    evaluated, published = (inputs.reports.get(name) for name in ("evaluate", "publish"))
    final, gate = runner.folder / FINAL, gate_of(runner.context.recipe, evaluated)
    return RunResult(
        folder=runner.folder,
        models={model.label: model for model in evaluated.models} if evaluated else {},
        metrics=evaluated.metrics if evaluated else {},
        gate=published.gate if published else gate,
        reload=published.reload if published else None,
        seconds={name: entry.seconds for name, entry in runner.entries.items()},
        report=runner.folder / REPORT,
        final=final if final.exists() else None,
        refused=None if all(result.passed for result in gate) else _checkpoint(inputs),
        reused=tuple(runner.reused),
    )
