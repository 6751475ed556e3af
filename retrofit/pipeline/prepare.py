"""Everything that can be wrong with a run is found here, before anything is written: cheap checks first.

What comes back holds all that the steps need to know of the recipe, the source model and this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.place import require_free_space, require_writable
from retrofit.checkpoint.read import Checkpoint
from retrofit.context import rope
from retrofit.context.candidates import candidates, rungs
from retrofit.errors import UserError
from retrofit.evaluate.harness import Harness, open_tasks, require_harness
from retrofit.evaluate.reader import varying
from retrofit.evaluate.score import Document
from retrofit.kernels.registry import Choice, choose
from retrofit.model import source as sources
from retrofit.model.families import describe, family_of
from retrofit.model.inspect import count_parameters
from retrofit.model.licence import other_licence_of
from retrofit.model.load import load_config, load_tokenizer, read_config, resolve_device, resolve_dtype
from retrofit.model.source import Source
from retrofit.model.spec import AttentionSpec
from retrofit.model.whole import require_complete
from retrofit.pipeline.journal import NAME as JOURNAL
from retrofit.pipeline.longcontext import definitions_of, longest_prompt
from retrofit.pipeline.passes import ASSUMED, ModelFacts, TaskSize, Throughput
from retrofit.pipeline.plan import (
    FOLDERS,
    MOST_SAMPLED,
    SAMPLED_TOKENS,
    Plan,
    claimed_length,
    make_plan,
    sampled_tokens,
    steps_of,
)
from retrofit.pipeline.task_checks import check_tasks
from retrofit.pipeline.texts import (
    LONG_SEARCH,
    check_calibration,
    read_before,
    recorded_text,
    require_distinct,
    scored_documents,
)
from retrofit.publish.card_input import require_licence_and_base
from retrofit.publish.reload import nothing_to_compare
from retrofit.recipe.hub import OTHER
from retrofit.recipe.schema import Context, Publish, Recipe, TextSource
from retrofit.recover.data import check_sources
from retrofit.recover.files import kind_of
from retrofit.recover.packing import CHARS_PER_TOKEN
from retrofit.recover.samples import Teacher
from retrofit.recover.schedule import check_lengths

if TYPE_CHECKING:
    from retrofit.console import Progress

_SPARE = 1.1  # room asked for, over the room planned
_USUALLY_READ = 1 << 25  # characters of a text that are compared with what is measured, at least


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check. kernel: of the evaluated models; documents: empty until weights are there.
    harness: the tasks to ask, with their data; None where there are none."""

    recipe: Recipe
    source: Source
    spec: AttentionSpec
    plan: Plan
    device: str
    kernel: Choice
    documents: tuple[Document, ...]
    notes: tuple[str, ...]
    harness: Harness | None = None

    @property
    def teacher(self) -> Teacher:
        """The original model, for text that it samples itself."""
        return teacher_of(self.recipe, self.source.folder, self.device)


def prepare(
    recipe: Recipe,
    *,
    revision: str | None = None,
    out: Path | None = None,
    weights: bool = True,
    beyond: bool = False,
    throughput: Throughput | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Check a run and gather what it needs. weights=False stops before weights are fetched or read. beyond: lengths
    may be longer than the window.

    Raises UserError for whatever would fail later.
    """
    model = require_model(recipe)
    if not steps_of(recipe):
        raise UserError("the recipe has no step", where=recipe.name, fix="add convert, context, recover or evaluate")
    if out is not None:
        require_run_folder(out)
    about_texts = _check_texts(recipe)
    _check_require(recipe)
    if recipe.evaluate and recipe.evaluate.tasks:
        require_harness()
    device = resolve_device(recipe.device)
    source = sources.resolve(model, revision=revision or recipe.revision, weights=False, progress=progress)
    config = load_config(source.folder)
    spec = describe(config)
    found = check_surgery(recipe, config, spec, source.folder, beyond=beyond)
    found = (*about_texts, *found)
    notes = (*source.notes, *found)
    if recipe.dtype not in ("auto", source.dtype) and recipe.convert is None:
        raise UserError(
            f"only `convert` writes weights in another dtype, and these are {source.dtype}",
            where="dtype",
            fix="write dtype: auto",
        )
    _check_publish(recipe, source)
    _check_proof(recipe, config)
    kernel = choose(recipe.kernel, spec, device)
    harness = tasks_of(recipe)
    if harness is not None:
        check_tasks(recipe, harness, config, kernel.name)
    plan = make_plan(recipe, facts_of(source, config, spec), throughput or ASSUMED, sizes(harness))
    if out is not None:
        missing = sum(cost.disk_bytes for cost in plan.steps if not (out / FOLDERS[cost.step]).exists())
        require_free_space(out, int(missing * _SPARE))
    documents: tuple[Document, ...] = ()
    if weights:
        source = sources.resolve(model, revision=revision or recipe.revision, progress=progress)
        written = None if recipe.dtype == "auto" else resolve_dtype(recipe.dtype, source.folder)
        checkpoint = Checkpoint.open(source.folder)
        if recipe.convert or recipe.recover:  # these go by stored names; transformers itself finds others too
            require_complete(checkpoint, config, spec)
        checkpoint.require_finite(written=written)
        read = read_before(recipe.evaluate.text if recipe.evaluate else (), source.folder)
        about_documents: list[str] = []
        positions = spec.max_position_embeddings
        documents = _documents(recipe, source, device, tuple(read), positions, about_documents)
        notes = (*notes, *read.values(), *about_documents)
        for note in (*found, *read.values(), *about_documents) if progress else ():
            progress.note(note)  # type: ignore[union-attr]
    return Prepared(recipe, source, spec, plan, device, kernel, documents, notes, harness)


def require_model(recipe: Recipe) -> str:
    """The model a recipe names; UserError when it names none."""
    if recipe.model is None:
        raise UserError("the recipe names no model", where="model", fix="add --model MODEL, or `model:` to the recipe")
    return recipe.model


def require_run_folder(out: Path) -> None:
    """UserError unless `out` can be made, is empty, or is the folder of a run."""
    require_writable(out)
    if out.is_file():
        raise UserError("the run folder is a file", where=str(out), fix="give another --out")
    known = out.is_dir() and ((out / "recipe.yaml").exists() or (out / JOURNAL).exists())
    if out.is_dir() and not known and any(out.iterdir()):
        raise UserError("the folder holds something that is not a run", where=str(out), fix="give another --out")


def facts_of(source: Source, config: Any, spec: AttentionSpec) -> ModelFacts:
    """What the plan needs; no weights are read."""
    return ModelFacts(source.requested, spec, count_parameters(source.folder, config), source.dtype)


def tasks_of(recipe: Recipe) -> Harness | None:
    """The tasks that a recipe asks, with their data; None without. Raises UserError as `open_tasks` does."""
    section = recipe.evaluate.tasks if recipe.evaluate else None
    return open_tasks(section) if section else None


def sizes(harness: Harness | None) -> tuple[TaskSize, ...]:
    """What a plan needs to know of tasks."""
    return tuple(
        TaskSize(one.name, one.questions, one.requests, one.request_bytes, one.longest_bytes, one.generated)
        for one in (harness.tasks if harness else ())
    )


def _all_texts(recipe: Recipe) -> tuple[TextSource, ...]:
    convert, recover, evaluate = recipe.convert, recipe.recover, recipe.evaluate
    calibration = convert.calibration.text if convert and convert.calibrates else ()
    search = recipe.context.searches if recipe.context else None
    return (*calibration, *(text for section in (search, recover, evaluate) if section for text in section.text))


def _check_texts(recipe: Recipe) -> tuple[str, ...]:
    """Every text can be read, and no two of a section are taken for one. Returns notes on what is left out of them."""
    convert, recover, evaluate = recipe.convert, recipe.recover, recipe.evaluate
    if convert and convert.calibrates:
        require_distinct(convert.calibration.text, "convert.calibration.text")
    if recover:
        require_distinct(recover.text, "recover.text")
    if evaluate:
        require_distinct(evaluate.text, "evaluate.text")
    notes = check_sources(dict.fromkeys(_all_texts(recipe)))
    return (*notes, *(check_calibration(convert.calibration) if convert and convert.calibrates else ()))


def _check_require(recipe: Recipe) -> None:
    """Every requirement is about something that this recipe measures."""
    if recipe.evaluate is None:
        return
    kinds = {kind_of(source.source) for source in recipe.evaluate.text}
    for key in recipe.require:
        metric, _, kind = key.partition("/")
        name, _, length = metric.partition("@")
        if name in ("task", "task_drop"):
            if recipe.evaluate.tasks is None:
                raise UserError("no task is asked", where=f"require.{key}", fix="add evaluate.tasks.names")
            continue  # which tasks there are is known when they are opened
        lengths = ", ".join(str(value) for value in recipe.evaluate.lengths)
        if name == "effective_length" and not (recipe.evaluate.context_gain or recipe.evaluate.needle):
            raise UserError(
                "nothing certifies an effective length",
                where=f"require.{key}",
                fix="add evaluate.context_gain: true, or a needle test",
            )
        if name in ("kv_ratio", "kernel_max_diff", "effective_length"):
            if length or kind:
                raise UserError(
                    f"`{name}` has no length and no kind of text", where=f"require.{key}", fix=f"write {name}"
                )
        elif not length:
            raise UserError(
                f"`{name}` needs a length", where=f"require.{key}", fix=f"write {name}@L, L one of {lengths}"
            )
        elif int(length) not in recipe.evaluate.lengths:
            raise UserError(
                f"nothing is measured at {length} tokens", where=f"require.{key}", fix=f"use one of {lengths}"
            )
        if kind and kind not in kinds:
            raise UserError(
                f"no text `{kind}` is evaluated", where=f"require.{key}", fix=f"use one of {', '.join(sorted(kinds))}"
            )


def check_surgery(
    recipe: Recipe, config: Any, spec: AttentionSpec, folder: Path, *, beyond: bool = False
) -> tuple[str, ...]:
    """The recipe's steps are possible on a model with this configuration, as loaded from `folder`. Returns notes for
    people.

    beyond: lengths may be longer than the window. Raises UserError otherwise.
    """
    if recipe.convert:
        family_of(config).with_kv_heads(config, recipe.convert.kv_heads)
    notes: list[str] = []
    if recipe.convert and recipe.convert.kv_heads == spec.layers[0].kv_heads:
        notes.append(f"the model already has {recipe.convert.kv_heads} KV heads: its weights are copied unchanged")
    claimed = claimed_length(recipe, spec.max_position_embeddings)
    for finding in _findings(config, folder):
        if finding.severity == "error" and (finding.rule != "theta-lost" or recipe.context):
            raise UserError(finding.what, where=f"config.json: {finding.where}", fix=finding.fix)
        notes.append(f"{finding.where}: {finding.what}")
    if recipe.context:
        notes += _check_context(recipe.context, config, claimed)
    if recipe.evaluate and not beyond:
        _require_within(longest_prompt(recipe.evaluate), claimed, "evaluate.lengths")
    if recipe.recover:
        _require_within(recipe.recover.sequence_length, claimed, "recover.sequence_length")
        check_lengths(recipe.recover, spec.max_position_embeddings, claimed)
    if recipe.convert and recipe.convert.calibrates:
        length = recipe.convert.calibration.sequence_length
        _require_within(length, spec.max_position_embeddings, "convert.calibration.sequence_length", extendable=False)
    return tuple(notes)


def _findings(config: Any, folder: Path) -> list[rope.Finding]:
    """Of the linter on config.json as it is stored, where a gap is still seen, and on what became of it.

    A theta left to the model's class (`theta-lost`) is the right one for many models: told, and refused only where it
    would have to be written.
    """
    stored = rope.lint(read_config(folder))
    known = {(finding.rule, finding.where) for finding in stored}
    return [*stored, *(finding for finding in rope.lint(config) if (finding.rule, finding.where) not in known)]


def _check_context(context: Context, config: Any, claimed: int) -> tuple[str, ...]:
    """Notes on an extension that is possible. Raises UserError otherwise."""
    search, method = context.searches, str(context.method)
    if search:
        rungs(claimed, search.tokens_for(claimed))
        method = candidates(config, length=claimed, count=1, portable=search.portable)[0].method
    planned = rope.plan(config, length=context.length, factor=context.factor, method=method, settings=context.settings)
    return () if search else planned.notes


def _check_publish(recipe: Recipe, source: Source) -> None:
    section = recipe.publish
    if section is None:
        return
    if recipe.evaluate is None:
        raise UserError(
            "nothing is published without measurements", where="publish", fix="keep `evaluate`, or add publish: null"
        )
    terms = terms_of(section, source)
    require_licence_and_base(terms.licence, section.base_model or source.base_model, terms.name, terms.link)


@dataclass(frozen=True)
class Terms:
    """The licence of what is published; name and link only beside the licence `other`."""

    licence: str | None
    name: str | None = None
    link: str | None = None


def terms_of(section: Publish, source: Source) -> Terms:
    """What the recipe says of the licence, and of the rest what the source's card says."""
    licence = section.licence or source.licence
    if licence != OTHER:
        return Terms(licence)
    name, link = other_licence_of(source.folder)
    return Terms(licence, section.licence_name or name, section.licence_link or link)


def _check_proof(recipe: Recipe, config: Any) -> None:
    """A length is scored at which the checkpoint, loaded again, can be compared with what was recorded."""
    context, evaluate = recipe.context, recipe.evaluate
    if recipe.publish is None or evaluate is None:
        return
    if context and not context.searches:  # what is searched for does not change with the length
        method, settings = str(context.method), context.settings
        config = rope.extend(config, length=context.length, factor=context.factor, method=method, settings=settings)
    varies = varying(config.get_text_config())
    if varies and min(evaluate.lengths) > varies[1]:
        raise nothing_to_compare(*varies)


def _require_within(length: int, claimed: int, where: str, *, extendable: bool = True) -> None:
    if length > claimed:
        longer = f", or extend the model with `context: {{length: {length}}}`" if extendable else ""
        raise UserError(
            f"{length} tokens are more than the {claimed} positions of the model",
            where=where,
            fix=f"ask for at most {claimed}{longer}",
        )


def _documents(
    recipe: Recipe, source: Source, device: str, read: tuple[TextSource, ...], positions: int, notes: list[str]
) -> tuple[Document, ...]:
    """read: sources that earlier steps of the model have read. positions: of the model. notes: gets what was left out
    and why."""
    evaluate = recipe.evaluate
    if evaluate is None:
        return ()
    trained_on = (*_all_texts(recipe.model_copy(update={"evaluate": None})), *read)
    tokenizer = load_tokenizer(source.folder)
    documents = scored_documents(
        evaluate.text,
        tokenizer,
        length=max(*evaluate.lengths, evaluate.document_tokens or 0),
        count=evaluate.documents,
        trained_on=trained_on,
        also_read=recorded_text(source.folder),
        teacher=teacher_of(recipe, source.folder, device),
        read_chars=_most_read(recipe, claimed_length(recipe, positions)),
        notes=notes,
    )
    definitions_of(evaluate, documents, tokenizer)  # a text too short for one of them is told now
    return tuple(documents)


def _most_read(recipe: Recipe, claimed: int) -> int:
    """Characters that the steps of a recipe, or of another one of usual size, read of one text source at most.

    claimed: tokens of the window after them.
    """
    convert, context, recover = recipe.convert, recipe.context, recipe.recover
    tokens = max(convert.calibration.tokens if convert else 0, recover.tokens if recover else 0)
    searched = LONG_SEARCH * claimed if context and context.searches else 0
    return max(_USUALLY_READ, CHARS_PER_TOKEN * tokens, searched)


def teacher_of(recipe: Recipe, folder: Path, device: str) -> Teacher:
    """The original model, for text that it samples itself: the same text in every step. Training reads what there is
    again rather than have more than `MOST_SAMPLED` tokens written."""
    tokens = SAMPLED_TOKENS
    if recipe.convert and recipe.convert.calibrates:
        calibration = recipe.convert.calibration
        tokens = max(tokens, sampled_tokens(calibration.text, calibration.tokens))
    if recipe.recover:
        tokens = max(tokens, min(MOST_SAMPLED, sampled_tokens(recipe.recover.text, recipe.recover.tokens)))
    return Teacher(folder, tokens=tokens, seed=recipe.seed, device=device)
