"""Commands of one step: one checkpoint in, one new checkpoint folder (or result) out, by the code of a run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.errors import UserError
from retrofit.evaluation.long_context import passes_of
from retrofit.evaluation.metrics.context_use import LongContext
from retrofit.evaluation.result import ModelEvaluation
from retrofit.evaluation.summary import Kept, summary
from retrofit.evaluation.tasks.answers import TaskAnswers, answers_file, from_file, samples_file, to_file
from retrofit.model.completeness import require_complete, require_sound
from retrofit.model.reexpress import reexpression_of
from retrofit.model.source import resolve
from retrofit.recipe.schema import Recipe
from retrofit.system.resume import ResumeKey
from retrofit.system.work_folder import kept, require_own
from retrofit.system.world import ALONE, Others, World, led
from retrofit.workflow.artifact import Artifact
from retrofit.workflow.context import ModelContext
from retrofit.workflow.joining import run_step, taking_part
from retrofit.workflow.opening_in_world import open_in
from retrofit.workflow.outputs import (
    done_before,
    require_file,
    require_moments,
    require_new,
    require_no_files,
    require_same,
    work_folder,
)
from retrofit.workflow.questions import Questions
from retrofit.workflow.step import Inputs, Place, Step
from retrofit.workflow.steps import steps_of
from retrofit.workflow.steps.convert import Convert
from retrofit.workflow.steps.evaluate import Evaluate
from retrofit.workflow.steps.reexpress import Reexpress, Section
from retrofit.workflow.stored import Stored

if TYPE_CHECKING:
    from retrofit.console import Progress


@dataclass(frozen=True)
class Written:
    """A new checkpoint folder and what was done. report: the fields of the step's own report."""

    step: str
    folder: Path
    report: Mapping[str, Any]


def write(
    recipe: Recipe,
    out: Path,
    *,
    original: str | None = None,
    moments: Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Written:
    """Do the one step of `recipe` and write its checkpoint to `out`; the same call resumes after an interruption, from
    the folder `<out>.work`.

    original: the model before the surgery, where the recipe's is what surgery made of it. moments: where to keep those
    of a conversion. overwrite: `out` may hold what an earlier call wrote, which is replaced. world: the processes that
    share the work; rank 0 alone writes.
    """

    def check() -> bool:
        finished = require_new(out, overwrite=overwrite)
        [step] = steps_of(recipe)
        if step.keeps_work:
            require_own(work_folder(out), step.name)
        if moments is not None and not finished:
            assert isinstance(step, Convert)
            require_moments(moments, step.section, out, overwrite=overwrite)
        return finished

    finished = world.only(check)
    usual: Any = {"revision": revision, "original": original, "out": out, "alone": True}
    context = open_in(world, recipe, progress=progress, **usual)
    [step] = context.steps

    def lead(others: Others) -> Written:
        if moments is not None and isinstance(step, Convert):
            step.require_moments(context)
        how: Any = {"finished": finished, "overwrite": overwrite, "needed": context.plan.disk_bytes}
        return _write(context, step, out, others, moments=moments, **how)

    return led(world, lead, taking_part(context))


def reexpress(
    model: str,
    out: Path,
    *,
    target: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Written:
    """`retrofit convert --reexpress-only`: the same function as another architecture, in the folder `out`."""
    usual: Any = {"revision": revision, "overwrite": overwrite, "progress": progress}
    return led(world, lambda others: _reexpress(model, out, others, target=target, dtype=dtype, **usual))


def _reexpress(
    model: str,
    out: Path,
    others: Others,
    *,
    target: str | None,
    dtype: str,
    revision: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> Written:
    finished = require_new(out, overwrite=overwrite)
    require_own(work_folder(out), Reexpress.name)
    source = resolve(model, revision=revision, reexpress=False, progress=progress)
    recipe = Recipe(name=Reexpress.name, model=model, dtype=dtype, evaluate=None, publish=None)  # type: ignore[arg-type]
    written = None if dtype == "auto" else source.model.dtype(dtype)
    checkpoint, config = source.model.checkpoint, source.model.config
    reexpression = reexpression_of(config, target)
    require_complete(checkpoint, config, ignored=reexpression.ignored if reexpression else ())
    source.hashed.update(require_sound(checkpoint, config, written=written, digested=source.unhashed))
    step = Reexpress(recipe, Section(target))
    context = ModelContext(recipe, (step,), source, source, "cpu", progress=progress)
    return _write(context, step, out, others, finished=finished, overwrite=overwrite)


def _write(
    context: ModelContext,
    step: Step,
    out: Path,
    others: Others,
    *,
    finished: bool,
    moments: Path | None = None,
    overwrite: bool,
    needed: int | None = None,
) -> Written:
    out = out.resolve()  # a link: work where what it names lies
    work = work_folder(out)
    key = step.key(context, Inputs({"original": context.artifact()}, moments=moments is not None))
    inputs = Inputs({"original": context.artifact(key.digest)}, moments=moments is not None)
    keeping = kept(work, step.name, step.begun_with) if step.keeps_work else nullcontext()
    with folder_lock(out), keeping, writing(out, needed=needed):
        if finished:
            return Written(step.name, out, done_before(out, key.digest))
        place = Place(
            out,
            work / key.digest[:16],
            moments,
            overwrite,
            before_replacing=lambda: require_new(out, overwrite=True),  # somebody may have put something there
        )
        report = step.recorded(run_step(step, context, inputs, place, others))
    notes = dict.fromkeys((*context.notes, *report.get("notes", ())))
    return Written(step.name, out, {**report, "notes": list(notes)})


def evaluate(
    recipe: Recipe,
    out: Path | None = None,
    *,
    revision: str | None = None,
    allow_extrapolation: bool = False,
    overwrite: bool = False,
    world: World = ALONE,
    progress: Progress | None = None,
) -> ModelEvaluation:
    """`retrofit evaluate`. allow_extrapolation: lengths may lie beyond the window; how it breaks there is worth seeing.

    out: a file for the token losses, beside which all that was measured is kept; a call that has ended is not repeated.
    world: the processes that share the work; rank 0 alone writes.
    """
    file = None if out is None else out.resolve()
    partial = file.with_name(f"{file.name}.scored") if file is not None else None

    def check() -> bool:
        if file is None or partial is None:
            if recipe.evaluate and recipe.evaluate.tasks and recipe.evaluate.tasks.log_samples:
                raise UserError(
                    "prompts and answers are kept beside the token losses, and those are not kept",
                    where="--log-samples",
                    fix="add --out FILE.npz",
                )
            return False
        finished = require_file(file, overwrite=overwrite)
        require_own(partial, Evaluate.name)
        return finished

    finished = world.only(check)
    usual: Any = {"revision": revision, "alone": True, "allow_extrapolation": allow_extrapolation}
    context = open_in(world, recipe, progress=progress, **usual)
    [step] = context.steps
    assert isinstance(step, Evaluate)

    def take_part(part: tuple[str, Artifact]) -> None:
        measured(context, step, *part, None)

    def lead(others: Others) -> ModelEvaluation:
        return _evaluate(context, step, file, partial, others, finished=finished, overwrite=overwrite)

    return led(world, lead, take_part)


def _evaluate(
    context: ModelContext,
    step: Evaluate,
    out: Path | None,
    partial: Path | None,
    others: Others,
    *,
    finished: bool,
    overwrite: bool,
) -> ModelEvaluation:
    label = context.source.base_model or Path(context.source.requested).name
    artifact = context.artifact()
    stored = None
    if out is not None:
        question = step.key(context, Inputs({label: artifact})).digest
        logged = bool(step.section.tasks and step.section.tasks.log_samples)
        stored = Stored(out, question, passes_of(step.section, step.native(context)), logged)
        if finished:
            require_same(out, question)
        elif not overwrite:
            require_no_files(stored.beside)
    with folder_lock(out) if out else nullcontext(), kept(partial, Evaluate.name) if partial else nullcontext():
        found = stored.read() if stored is not None and finished else None
        if found is not None:
            context.note(f"done before: {out} holds these losses; costs are measured anew")
        else:
            with others.join((label, artifact)) if step.distributed else nullcontext():
                here = context if step.distributed else context.alone_in_world()
                found = measured(here, step, label, artifact, partial)
            if stored is not None and partial is not None:
                found = stored.write(found, partial, overwrite=overwrite or finished)
        # Still in the block: a kill while costs are measured must not make everything before them be read again.
        step.announce_costs(context)
        [model] = summary({label: context.model}, {label: found}, step.section, **step.how(context))
    return replace(model, losses=out)


def measured(context: ModelContext, step: Evaluate, label: str, artifact: Artifact, partial: Path | None) -> Kept:
    """One model alone, measured by all processes of the context. partial: where finished parts are kept meanwhile."""
    native = step.native(context)
    found = step.score(context, label, artifact, partial, native)
    answers = LongContext(
        native, defined=found.measured.defined, needle=found.measured.needle, ruler=found.measured.ruler
    )
    tasks = _tasks(context, step, artifact, native, partial)
    return Kept(found.losses, found.measured.passes, answers, found.kernel.name, found.kernel.reason, (), tasks)


def _tasks(
    context: ModelContext, step: Evaluate, artifact: Artifact, native: int, partial: Path | None
) -> dict[str, TaskAnswers]:
    """What the model answers to every task; finished ones are kept in `partial`, by rank 0."""
    questions = Questions.of(context, step.section)
    found: dict[str, TaskAnswers] = {}
    with questions.reader(context.model, context.claimed, native) as ask:
        for asked in questions.tasks:
            settings = [questions.key(asked), context.recipe.kernel, context.device_kind, native]
            key = ResumeKey(asked.name, step.version, settings, {"checkpoint": dict(artifact.digests)}).digest
            file = answers_file(partial, "model", asked.name) if partial else None
            log = samples_file(file) if file and questions.logs(asked) else None
            known = file is not None and file.is_file() and (log is None or log.is_file())
            kept_here = from_file(file).get(asked.name) if file and known else None
            before = context.world.share(kept_here)
            if before is not None and before.key == key:
                found[asked.name] = before
                context.note(f"task {asked.name}: done before, kept")
                continue
            found[asked.name] = replace(ask(asked, log), key=key)
            if file:
                to_file({asked.name: found[asked.name]}, file)
    return found
