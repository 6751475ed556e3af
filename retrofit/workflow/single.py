"""The steps as commands of their own: one checkpoint in, one new checkpoint folder (or result) out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.provenance import FILE, read_provenance
from retrofit.checkpoint.read import Checkpoint
from retrofit.data.calibration import within_window
from retrofit.data.documents import documents_digest
from retrofit.data.identity import identity
from retrofit.errors import UserError
from retrofit.evaluation.long_context import conclude, longest_prompt, native_length, passes_of
from retrofit.evaluation.metrics.context_use import LongContext
from retrofit.evaluation.metrics.perplexity import Row, table
from retrofit.evaluation.tasks.answers import TaskAnswers, TaskScore
from retrofit.evaluation.tasks.harness import require_harness
from retrofit.model.completeness import require_complete, require_sound
from retrofit.model.families import describe
from retrofit.model.load import load_config, resolve_dtype
from retrofit.model.reexpress import FORMAT, reexpression_of
from retrofit.model.source import Source, resolve
from retrofit.recipe.schema import Evaluate, Recipe
from retrofit.recovery.schedule import check_lengths
from retrofit.recovery.student_teacher import require_same_vocabulary
from retrofit.workflow import operations
from retrofit.workflow.journal import fingerprint
from retrofit.workflow.operations import Origin
from retrofit.workflow.outputs import (
    done_before,
    require_file,
    require_moments,
    require_new,
    require_no_files,
    require_same,
    work_folder,
)
from retrofit.workflow.prepare import Prepared, prepare, require_model, teacher_of
from retrofit.workflow.public import source_record
from retrofit.workflow.runner import VERSIONS
from retrofit.workflow.stored import Measurement, Stored
from retrofit.workflow.tasks import ask_folder, key_of
from retrofit.workflow.work_folder import kept, require_own

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.evaluation.cost import RunCost


@dataclass(frozen=True)
class Written:
    """A new checkpoint folder and what was done. report: the fields of the step's own report."""

    step: str
    folder: Path
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. rows: by kind of text and length. kv_cache_bytes: by tokens, for one sequence.

    cost: None when it was not measured. losses: the file they were kept in.
    long_context: whether the context is used, as far as that was asked for. tasks: scores of the tasks asked.
    """

    model: str
    rows: tuple[Row, ...]
    kernel: str
    dtype: str
    kv_heads: int
    kv_bytes_per_token: int
    kv_cache_bytes: Mapping[str, int]
    cost: RunCost | None
    claimed_length: int
    losses: Path | None
    long_context: LongContext
    tasks: tuple[TaskScore, ...] = ()


def convert(
    recipe: Recipe,
    out: Path,
    *,
    moments: Path | None,
    revision: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> Written:
    """`retrofit convert`. The same call goes on after an interruption, from the folder `<out>.work`."""
    section = recipe.convert
    assert section
    finished = require_new(out, overwrite=overwrite)
    work = work_folder(out)
    require_own(work, "convert")
    if moments is not None and not finished:
        require_moments(moments, section, out, overwrite=overwrite)
    recipe, shorter = _fitted(recipe, moments, revision, progress)
    section = recipe.convert
    assert section
    prepared = prepare(recipe, revision=revision, out=out, progress=progress)
    out = out.resolve()  # a link: work where what it names lies
    text = identity(section.calibration.text) if section.calibrates else None
    options = [recipe.dtype, recipe.seed, moments is not None]
    inputs = {"checkpoint": dict(prepared.source.digests), "text": text, "options": options}
    question = fingerprint("convert", VERSIONS["convert"], operations.dump(section), inputs)
    with folder_lock(out), kept(work, "convert"), writing(out, needed=prepared.plan.disk_bytes):
        if finished:
            return Written("convert", out, done_before(out, question))
        report = operations.convert(
            prepared.source.folder,
            out,
            section,
            _origin(prepared.source, question),
            teacher=prepared.teacher,
            dtype=recipe.dtype,
            device=prepared.device,
            seed=recipe.seed,
            work=work / question[:16],
            moments=moments,
            overwrite=overwrite,
            progress=progress,
        )
    notes = dict.fromkeys((*prepared.notes, *shorter, *report.notes))
    return Written("convert", out, operations.facts(replace(report, notes=tuple(notes))))


def _fitted(
    recipe: Recipe, moments: Path | None, revision: str | None, progress: Progress | None
) -> tuple[Recipe, tuple[str, ...]]:
    """The conversion with calibration sequences that fit the model's window, which no option sets, and notes on that.

    Raises UserError for moments that would not be measured because the model has that many KV heads already.
    """
    section = recipe.convert
    assert section
    source = resolve(require_model(recipe), revision=revision, weights=False, progress=progress)
    spec = describe(load_config(source.folder))
    if moments is not None and section.kv_heads == spec.layers[0].kv_heads:
        raise UserError(
            f"the model already has {section.kv_heads} KV heads, so nothing is measured",
            where="--moments",
            fix="leave out --moments, or choose fewer --kv-heads",
        )
    if not section.calibrates:
        return recipe, ()
    calibration, notes = within_window(section.calibration, spec.max_position_embeddings)
    for note in notes if progress else ():
        progress.note(note)  # type: ignore[union-attr]
    return recipe.model_copy(update={"convert": section.model_copy(update={"calibration": calibration})}), notes


def reexpress(
    model: str,
    out: Path,
    *,
    target: str | None,
    dtype: str,
    revision: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> Written:
    """`retrofit convert --reexpress-only`. The same call goes on after an interruption, from `<out>.work`."""
    finished = require_new(out, overwrite=overwrite)
    work = work_folder(out)
    require_own(work, "convert")
    source = resolve(model, revision=revision, reexpress=False, progress=progress)
    written = None if dtype == "auto" else resolve_dtype(dtype, source.folder)
    checkpoint, config = Checkpoint.open(source.folder), load_config(source.folder)
    reexpression = reexpression_of(config, target)
    require_complete(checkpoint, config, ignored=reexpression.ignored if reexpression else ())
    require_sound(checkpoint, config, written=written)
    out = out.resolve()  # a link: work where what it names lies
    inputs = {"checkpoint": dict(source.digests)}
    question = fingerprint("reexpress", str(FORMAT), [target, dtype], inputs)
    with folder_lock(out), kept(work, "convert"), writing(out):
        if finished:
            return Written("reexpress", out, done_before(out, question))
        report = operations.reexpress(
            source.folder,
            out,
            _origin(source, question),
            target=target,
            dtype=dtype,
            work=work / question[:16],
            overwrite=overwrite,
            progress=progress,
        )
    return Written("reexpress", out, operations.facts(report))


def extend(recipe: Recipe, out: Path, *, revision: str | None, overwrite: bool, progress: Progress | None) -> Written:
    """`retrofit extend`. A search goes on after an interruption, from the folder `<out>.work`."""
    assert recipe.context
    finished = require_new(out, overwrite=overwrite)
    work = work_folder(out)
    if recipe.context.searches:
        require_own(work, "extend")
    prepared = prepare(recipe, revision=revision, out=out, progress=progress)
    out = out.resolve()  # a link: work where what it names lies
    text = identity(recipe.context.searches.text) if recipe.context.searches else None
    options = [recipe.kernel, recipe.seed] if recipe.context.searches else []
    inputs = {"checkpoint": dict(prepared.source.digests), "text": text, "options": options}
    question = fingerprint("extend", VERSIONS["extend"], operations.dump(recipe.context), inputs)
    keeping = kept(work, "extend") if recipe.context.searches else nullcontext()
    with folder_lock(out), keeping, writing(out, needed=prepared.plan.disk_bytes):
        if finished:
            return Written("extend", out, done_before(out, question))
        report = operations.extend(
            prepared.source.folder,
            out,
            recipe.context,
            _origin(prepared.source, question),
            teacher=prepared.teacher,
            kernel=recipe.kernel,
            device=prepared.device,
            seed=recipe.seed,
            work=work / "search",
            link=recipe.link,
            overwrite=overwrite,
            progress=progress,
        )
    return Written("extend", out, report)


def recover(recipe: Recipe, teacher: str, out: Path, *, overwrite: bool, progress: Progress | None) -> Written:
    """`retrofit recover`."""
    assert recipe.recover
    finished = require_new(out, overwrite=overwrite)
    work = work_folder(out)
    require_own(work, "recover")
    _check_teacher(recipe, teacher, progress)
    prepared = prepare(recipe, out=out, progress=progress)
    original = resolve(teacher, progress=progress)
    checkpoint, config = Checkpoint.open(original.folder), load_config(original.folder)
    require_complete(checkpoint, config)
    require_sound(checkpoint, config)
    out = out.resolve()  # a link: work where what it names lies
    inputs = {
        "checkpoint": dict(prepared.source.digests),
        "teacher": dict(original.digests),
        "text": identity(recipe.recover.text),
        "options": [recipe.kernel, recipe.seed],
    }
    question = fingerprint("recover", VERSIONS["recover"], operations.dump(recipe.recover), inputs)
    with folder_lock(out), kept(work, "recover"), writing(out, needed=prepared.plan.disk_bytes):
        if finished:
            return Written("recover", out, done_before(out, question))
        report = operations.recover(
            prepared.source.folder,
            original.folder,
            out,
            recipe.recover,
            _origin(prepared.source, question),
            samples=teacher_of(recipe, original.folder, prepared.device),
            kernel=recipe.kernel,
            device=prepared.device,
            seed=recipe.seed,
            work=work,
            overwrite=overwrite,
            progress=progress,
        )
    return Written("recover", out, operations.facts(report))


def _check_teacher(recipe: Recipe, teacher: str, progress: Progress | None) -> None:
    """The teacher can teach this model at these lengths; configurations alone are read. UserError otherwise."""
    section = recipe.recover
    assert section
    if section.loss != "distill":
        return
    folders = [
        resolve(one, revision=revision, weights=False, progress=progress).folder
        for one, revision in ((require_model(recipe), recipe.revision), (teacher, None))
    ]
    student, original = (describe(load_config(folder)) for folder in folders)
    require_same_vocabulary(original, student, "--teacher")
    check_lengths(section, original.max_position_embeddings, student.max_position_embeddings)


def evaluate(
    recipe: Recipe, out: Path | None, *, revision: str | None, beyond: bool, overwrite: bool, progress: Progress | None
) -> Evaluation:
    """`retrofit evaluate`. beyond: lengths may lie beyond the window; how it breaks there is worth seeing."""
    section = recipe.evaluate
    assert section and recipe.model
    out = None if out is None else out.resolve()
    partial = out.with_name(f"{out.name}.scored") if out is not None else None
    finished = False
    if out is not None and partial is not None:
        finished = require_file(out, overwrite=overwrite)
        require_own(partial, "evaluate")
    if section.tasks:
        require_harness()
    longest = longest_prompt(section)
    without = recipe.model_copy(update={"evaluate": section.model_copy(update={"tasks": None})})
    prepared = prepare(without, revision=revision, beyond=True, weights=False, progress=progress)
    if longest > prepared.spec.max_position_embeddings:
        _require_beyond(recipe.model, longest, prepared.spec.max_position_embeddings, beyond)
        if progress:
            progress.note(
                f"{longest:,} tokens lie beyond the model's {prepared.spec.max_position_embeddings:,} positions"
            )
    prepared = prepare(recipe, revision=revision, beyond=True, progress=progress)
    folder, spec = prepared.source.folder, prepared.spec
    label = prepared.source.base_model or Path(recipe.model).name
    stored = None
    if out is not None:
        stored = Stored(out, _question(prepared, section), passes_of(section, native_length(load_config(folder))))
        if finished:
            require_same(out, stored.question)
        elif not overwrite:
            require_no_files(stored.beside)
    with folder_lock(out) if out else nullcontext(), kept(partial, "evaluate") if partial else nullcontext():
        found = stored.read() if stored is not None and finished else None
        if found is not None and progress:
            progress.note(f"done before: {out} holds these losses; costs are measured anew")
        if found is None:
            found = _scored(prepared, section, label, partial, progress)
            if stored is not None and partial is not None:
                found = stored.write(found, partial, overwrite=overwrite or finished)
        losses, context, answers = found.losses, found.context, found.answers
        # Still in the block: a kill while costs are measured must not make everything before them be read again.
        costs = operations.run_costs(
            {label: folder}, section, kernel=recipe.kernel, device=prepared.device, seed=recipe.seed
        )
    per_token, by_length, heads = operations.kv_bytes(folder, (*section.lengths, spec.max_position_embeddings))
    return Evaluation(
        model=label,
        rows=tuple(table(losses, section.lengths, tail=section.tail, resamples=section.resamples, seed=recipe.seed)),
        kernel=str(losses.meta["kernel"]),
        dtype=str(losses.meta["dtype"]),
        kv_heads=heads,
        kv_bytes_per_token=per_token,
        kv_cache_bytes=by_length,
        cost=costs[label],
        claimed_length=spec.max_position_embeddings,
        losses=out,
        long_context=context,
        tasks=tuple(row for one in answers.values() for row in one.rows()),
    )


def _question(prepared: Prepared, section: Evaluate) -> str:
    """Digest of everything that an evaluation was asked; costs, which are of the moment, are not part of it."""
    harness, recipe = prepared.harness, prepared.recipe
    config = {
        **section.model_dump(mode="json"),
        "kernel": recipe.kernel,
        "device": prepared.device,
        "seed": recipe.seed,
    }
    inputs = {
        "checkpoint": dict(prepared.source.digests),
        "documents": documents_digest(prepared.documents),
        "tasks": [key_of(harness, asked, section) for asked in harness.tasks] if harness else [],
    }
    return fingerprint("evaluate", VERSIONS["evaluate"], config, inputs)


def _scored(
    prepared: Prepared, section: Evaluate, label: str, partial: Path | None, progress: Progress | None
) -> Measurement:
    folder, recipe = prepared.source.folder, prepared.recipe
    losses, _, measured = operations.score_folder(
        folder,
        prepared.documents,
        section,
        label=label,
        kernel=recipe.kernel,
        device=prepared.device,
        seed=recipe.seed,
        identity=prepared.source.digests if partial is not None else None,
        partial=partial,
        progress=progress,
    )
    context = replace(
        conclude(
            losses,
            measured.passes,
            section,
            native_length(load_config(folder)),
            needle=measured.needle.scores if measured.needle else None,
            seed=recipe.seed,
        ),
        defined=measured.defined,
        needle=measured.needle,
        ruler=measured.ruler,
    )
    return Measurement(losses, context, _answers(prepared, section, partial, progress), measured.passes)


def _answers(
    prepared: Prepared, section: Evaluate, partial: Path | None, progress: Progress | None
) -> dict[str, TaskAnswers]:
    if prepared.harness is None:
        return {}
    folder = prepared.source.folder
    return ask_folder(
        folder,
        prepared.harness,
        section,
        kernel=prepared.recipe.kernel,
        device=prepared.device,
        length=native_length(load_config(folder)),
        identity=prepared.source.digests,
        partial=partial,
        progress=progress,
    )


def _require_beyond(model: str, longest: int, positions: int, beyond: bool) -> None:
    if not beyond:
        raise UserError(
            f"{longest} tokens are more than the {positions} positions of the model",
            where="--lengths",
            fix=f"extend it: retrofit extend {model} --length {longest} --out DIR, or add --beyond to see it break",
        )


def _origin(source: Source, question: str) -> Origin:
    """Where a checkpoint comes from: its own record goes on when it was written by us."""
    if (source.folder / FILE).is_file():
        record = read_provenance(source.folder)
        return Origin(record.get("source") or source_record(source), tuple(record.get("steps") or ()), question)
    return Origin(source_record(source), (), question)
