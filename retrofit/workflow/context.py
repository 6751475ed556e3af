"""What a command has opened, once: the model, its configuration and weights, its text. Everything that can be wrong is
found while it is opened, before anything is written: cheap checks first."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.extensions import require_record
from retrofit.checkpoint.staging import require_free_space, require_writable
from retrofit.data.texts import check_sources
from retrofit.errors import UserError
from retrofit.evaluation.long_context import native_length
from retrofit.kernels.registry import KernelChoice, choose, split_kernel
from retrofit.model.completeness import require_complete, require_sound
from retrofit.model.families import family_of
from retrofit.model.folder import ModelFolder
from retrofit.model.inspect import count_parameters
from retrofit.model.load import resolve_device, resolve_dtype
from retrofit.model.source import Source, resolve, with_weights
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.resolve import default_lengths_within, is_relative, resolved
from retrofit.recipe.schema import Evaluate, Recipe, TextSource
from retrofit.system.world import ALONE, World
from retrofit.workflow.artifact import Artifact, Provenance
from retrofit.workflow.checks import check_headers, check_memory, check_positions
from retrofit.workflow.estimate.cost import ASSUMED, ModelFacts, Throughput
from retrofit.workflow.plan import Plan, claimed_length, make_plan
from retrofit.workflow.questions import sizes
from retrofit.workflow.samples import samples_of
from retrofit.workflow.step import Step
from retrofit.workflow.steps import FOLDERS, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.data.documents import Document
    from retrofit.data.samples import Teacher
    from retrofit.evaluation.tasks.harness import Harness

_SPARE = 1.1  # room asked for, over the room planned


@dataclass
class ModelContext:
    """One command's model and everything around it. steps: of its recipe. original_source: the model before the
    surgery, where that is another one than `source`. allow_extrapolation: lengths may be longer than the window.
    alone: the one step of a command. requested: the recipe before its relative lengths became numbers.

    documents: to measure on; empty until texts are read. harness: the tasks to ask, with their data. notes: what a
    person should know.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    source: Source
    original_source: Source
    device: str
    world: World = ALONE
    throughput: Throughput = ASSUMED
    allow_extrapolation: bool = False
    alone: bool = False
    requested: Recipe | None = None
    progress: Progress | None = None
    documents: tuple[Document, ...] = ()
    harness: Harness | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> ModelFolder:
        """The model's folder."""
        return self.source.model

    @property
    def original_model(self) -> ModelFolder:
        """The folder of the model before the surgery."""
        return self.original_source.model

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def spec(self) -> AttentionSpec:
        """What the model's attention is."""
        return self.model.spec

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def native(self) -> int:
        """Positions of the model."""
        return self.spec.max_position_embeddings

    @property
    def claimed(self) -> int:
        """Positions after the recipe."""
        return claimed_length(self.recipe, self.native)

    @cached_property
    def kernel(self) -> KernelChoice:
        """The kernel that the evaluated models are read with."""
        return choose(self.recipe.kernel, self.spec, self.device)

    @cached_property
    def samples(self) -> Teacher:
        """The original model, for text that it samples itself."""
        return samples_of(self.recipe, self.original_model, self.device)

    @cached_property
    def facts(self) -> ModelFacts:
        """What a plan needs to know of the model; no weights are read."""
        parameters = count_parameters(self.model.path, self.config)
        return ModelFacts(self.source.requested, self.spec, parameters, self.source.dtype)

    @cached_property
    def plan(self) -> Plan:
        """What the recipe would do and cost."""
        return make_plan(self.recipe, self.facts, self.throughput, sizes(self.recipe.evaluate, self.harness))

    @property
    def device_kind(self) -> str:
        """cpu or cuda: what results may depend on, whichever GPU it is."""
        return self.device.partition(":")[0]

    def alone_in_world(self) -> ModelContext:
        """The same for what this process does by itself."""
        context = copy(self)
        context.world = ALONE
        return context

    def artifact(self, question: str | None = None) -> Artifact:
        """The model as what the first step reads. question: of a command of one step."""
        return Artifact(self.model, dict(self.source.digests), Provenance.of(self.source, question))

    def require_kernel(self, dtype: str) -> None:
        """UserError unless the kernel exists for what a step does, in the dtype that it is asked to do it in."""
        working = self.model.working_dtype(dtype, self.device)
        choose(self.recipe.kernel, self.spec, self.device, dtype=self.source.dtype if working == "auto" else working)

    def require_splittable(self, where: str) -> None:
        """UserError unless one sequence can be shared out over processes: the kernel, the attention, this device.

        where: the setting that asks for it.
        """
        try:
            split_kernel(self.recipe.kernel, self.spec, self.device)
        except UserError as error:
            raise UserError(error.what, where=f"{where}, {error.where}", fix=error.fix) from error

    def note(self, *notes: str) -> None:
        """Lines for the person who waits."""
        for note in notes if self.progress else ():
            self.progress.note(note)  # type: ignore[union-attr]

    def choose_documents(self, section: Evaluate, *, sample: bool) -> Iterable[str]:
        """Choose what is measured, none of it read by any step; returns notes on what was left out.

        sample: the model may be asked to write its own text.
        """
        from retrofit.data.measured import read_before, recorded_text, scored_documents
        from retrofit.data.texts import OWN_SAMPLES
        from retrofit.evaluation.long_context import definitions_of
        from retrofit.workflow.reading import most_read

        read = read_before(section.text, self.model.path)
        text = [one for one in section.text if sample or one.source != OWN_SAMPLES]
        if not text:
            return read.values()
        left_out: list[str] = []
        documents = scored_documents(
            text,
            self.tokenizer,
            length=max(*section.lengths, section.document_tokens or 0),
            count=section.documents,
            trained_on=(*self.texts(learning=True), *read),
            also_read=recorded_text(self.model.path),
            teacher=self.samples,
            read_chars=most_read(self.recipe, self.claimed),
            notes=left_out,
        )
        definitions_of(section, documents, self.tokenizer)  # a text too short for one of them is told now
        self.documents = tuple(documents)
        return (*read.values(), *left_out)

    def texts(self, *, learning: bool = False) -> tuple[TextSource, ...]:
        """All text that the steps read. learning: only what they fit something to."""
        return tuple(text for step in self.steps if step.learns or not learning for text in step.texts)


def open_model(
    recipe: Recipe,
    *,
    revision: str | None = None,
    original: str | None = None,
    alone: bool = False,
    progress: Progress | None = None,
) -> ModelContext:
    """The model of a recipe with its configuration, no weights, and the recipe in this model's numbers.

    original: the model before the surgery, where it is another one. alone: for a command of one step. Raises UserError
    for what is not possible on such a model.
    """
    source = resolve(require_model(recipe), revision=revision or recipe.revision, weights=False, progress=progress)
    before = source if original is None else resolve(original, weights=False, progress=progress)
    requested = recipe
    recipe, notes = in_numbers(recipe, source.model, before.model, alone=alone)
    device = resolve_device(recipe.device)
    return ModelContext(
        recipe,
        steps_of(recipe),
        source,
        before,
        device,
        alone=alone,
        requested=requested,
        progress=progress,
        notes=list(notes),
    )


def in_numbers(
    recipe: Recipe, model: ModelFolder, original: ModelFolder, *, alone: bool = False
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the numbers of this model for its relative lengths and KV heads and for the default lengths of an
    evaluation, and notes. alone: of a model that is recovered or measured alone, `native` is the window before it was
    extended."""
    by_default = recipe.evaluate is not None and "lengths" not in recipe.evaluate.model_fields_set
    recipe, notes = _without_words(recipe, model, original, alone=alone)
    if not by_default:
        return recipe, notes
    recipe, more = default_lengths_within(recipe, claimed_length(recipe, model.spec.max_position_embeddings))
    return recipe, (*notes, *more)


def _without_words(
    recipe: Recipe, model: ModelFolder, original: ModelFolder, *, alone: bool
) -> tuple[Recipe, tuple[str, ...]]:
    if not is_relative(recipe):
        return recipe, ()
    spec = model.spec
    counts = [one.kv_heads for one in family_of(model.config).conversions(spec) if one.possible]
    native = target = spec.max_position_embeddings
    if original is not model:
        native = original.spec.max_position_embeddings
    elif alone and recipe.context is None:
        native = native_length(model)
    return resolved(recipe, native, target, counts)


def check_model(context: ModelContext) -> bool:
    """Every step is possible on a model with this configuration; whether its weights are on this machine, which are
    checked by their headers then. Notes go to the context. Raises UserError otherwise."""
    context.notes += check_positions(context.model)
    for step in context.steps:
        context.notes += step.check(context)
    return _check_headers(context)


def open_context(
    recipe: Recipe,
    *,
    revision: str | None = None,
    original: str | None = None,
    out: Path | None = None,
    dry: bool = False,
    allow_extrapolation: bool = False,
    alone: bool = False,
    throughput: Throughput | None = None,
    progress: Progress | None = None,
) -> ModelContext:
    """Open the model of a recipe and check everything. out: the folder of the run, or of the one step's result.

    alone: it is a command of one step. dry: the same checks, but nothing is fetched, converted or sampled: what is not
    on this machine yet is not looked at, which a note says. Raises UserError for whatever would fail later.
    """
    require_model(recipe)
    steps = steps_of(recipe)
    if not steps:
        raise UserError("the recipe has no step", where=recipe.name, fix="add convert, context, recover or evaluate")
    about = list(check_sources(dict.fromkeys(text for step in steps for text in step.texts)))
    for step in steps:
        about += step.check_options()
    context = open_model(recipe, revision=revision, original=original, alone=alone, progress=progress)
    recipe, steps = context.recipe, context.steps
    context.allow_extrapolation, context.throughput = allow_extrapolation, throughput or ASSUMED
    context.notes += about
    require_record(context.model.path)
    here = check_model(context)
    if recipe.dtype not in ("auto", context.source.dtype) and recipe.convert is None:
        raise UserError(
            f"only `convert` writes weights in another dtype, and these are {context.source.dtype}",
            where="dtype",
            fix="write dtype: auto",
        )
    resolve_dtype(recipe.dtype, context.model.path)
    for step in steps:
        context.notes += step.check_here(context)
    context.notes += check_memory(context.plan.steps, context.device)
    if out is not None:
        missing = sum(cost.disk_bytes for cost in context.plan.steps if not (out / FOLDERS[cost.step]).exists())
        require_free_space(out, int(missing * _SPARE))
    if not dry:
        _fetch(context, revision or recipe.revision)
        here = here or _check_headers(context)
    if here:
        _check_weights(context, out, dry=dry)
    else:
        context.notes.append("the weights are not on this machine: they are checked when they are")
    if any(step.needs_tokens for step in steps):
        _check_texts(context, weights=here, sample=not dry)
    if not dry:
        context.note(*context.notes)
    context.notes[:0] = context.source.notes
    return context


def _check_headers(context: ModelContext) -> bool:
    by_name = any(step.reads_by_name(context) for step in context.steps)
    return check_headers(context.model, by_name=by_name)


def _fetch(context: ModelContext, revision: str | None) -> None:
    """Bring the weights of both models to this machine."""
    source = with_weights(context.source, revision=revision, progress=context.progress)
    if context.original_source is context.source:
        context.original_source = source
    else:
        context.original_source = with_weights(context.original_source, progress=context.progress)
        original = context.original_model
        require_complete(original.checkpoint, original.config)
        digested = context.original_source.unhashed
        context.original_source.hashed.update(require_sound(original.checkpoint, original.config, digested=digested))
    context.source = source


def _check_weights(context: ModelContext, out: Path | None, *, dry: bool) -> None:
    """The weights are finite in the dtype they will be written in, a head that is stored beside the embedding it is
    tied to equals it, and what a step keeps while it works has room. dry: no step will ask for their digests."""
    from retrofit.kv_heads.disk import require_room
    from retrofit.kv_heads.room import held

    dtype = context.recipe.dtype
    written = None if dtype == "auto" else resolve_dtype(dtype, context.model.path)
    source = context.source
    digested = () if dry else source.unhashed
    source.hashed.update(require_sound(context.model.checkpoint, context.config, written=written, digested=digested))
    for step in context.steps if out is not None else ():
        assert out
        if not (out / FOLDERS[step.name]).exists() and (needed := step.room(context)):
            begun = (out / f"{FOLDERS[step.name]}.work", out.with_name(f"{out.name}.work"))
            require_room(out, needed - sum(held(work) for work in begun if work.is_dir()))


def _check_texts(context: ModelContext, *, weights: bool, sample: bool) -> None:
    from retrofit.data.samples import sample_path
    from retrofit.data.texts import OWN_SAMPLES

    context.tokenizer  # noqa: B018  a broken one is told before its texts
    for step in context.steps:
        context.notes += step.check_data(context, weights=weights, sample=sample)
    own = any(text.source == OWN_SAMPLES for text in context.texts())
    if weights and own and not (path := sample_path(context.samples)).exists():
        require_writable(path.parent)


def require_model(recipe: Recipe) -> str:
    """The model a recipe names; UserError when it names none."""
    if recipe.model is None:
        raise UserError("the recipe names no model", where="model", fix="add --model MODEL, or `model:` to the recipe")
    return recipe.model
