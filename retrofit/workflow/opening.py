"""Open what a command works on. Everything that can be wrong is found here, before anything is written: cheap checks
first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.checkpoint.extensions import require_record
from retrofit.checkpoint.staging import require_free_space, require_writable
from retrofit.data.texts import check_sources
from retrofit.errors import UserError
from retrofit.evaluation.long_context import native_length
from retrofit.model.completeness import require_complete, require_sound
from retrofit.model.families import family_of
from retrofit.model.folder import ModelFolder
from retrofit.model.load import resolve_device, resolve_dtype
from retrofit.model.source import resolve, with_weights
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.resolve import default_lengths_within, is_relative, resolved
from retrofit.recipe.schema import Recipe
from retrofit.system.device import forward_tokens, is_gpu
from retrofit.workflow.checks import check_headers, check_memory, check_positions
from retrofit.workflow.context import ModelContext
from retrofit.workflow.estimate.cost import ASSUMED, Throughput
from retrofit.workflow.plan import claimed_length
from retrofit.workflow.steps import FOLDERS, steps_of

if TYPE_CHECKING:
    from retrofit.console import Progress

_SPARE = 1.1  # room asked for, over the room planned


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
    recipe = sized(recipe, requested, before.model.spec, device)
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


def sized(recipe: Recipe, requested: Recipe, spec: AttentionSpec, device: str, *, memory: int | None = None) -> Recipe:
    """The recipe with the chunk that fills the device, where the one that was asked for leaves it open.

    memory: bytes of a GPU that is not here.
    """
    if not is_gpu(device) or recipe.evaluate is None or requested.evaluate is None:
        return recipe
    if "chunk" in requested.evaluate.model_fields_set:
        return recipe
    evaluate = recipe.evaluate.model_copy(update={"chunk": forward_tokens(device, spec, memory=memory)})
    return recipe.model_copy(update={"evaluate": evaluate})


def in_numbers(
    recipe: Recipe, model: ModelFolder, original: ModelFolder, *, alone: bool = False
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the numbers of this model for its relative lengths and KV heads and for the default lengths of an
    evaluation and of a calibration, and notes. alone: of a model that is recovered or measured alone, `native` is the
    context length before it was extended."""
    by_default = recipe.evaluate is not None and "lengths" not in recipe.evaluate.model_fields_set
    recipe, notes = _without_words(recipe, model, original, alone=alone)
    recipe, shorter = _calibrated_within(recipe, model.spec.max_position_embeddings)
    notes = (*notes, *shorter)
    if not by_default:
        return recipe, notes
    recipe, more = default_lengths_within(recipe, claimed_length(recipe, model.spec.max_position_embeddings))
    return recipe, (*notes, *more)


def _calibrated_within(recipe: Recipe, positions: int) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe whose heads are calibrated on sequences that the model holds, where nobody says how long they are."""
    section = recipe.convert
    if section is None or not section.calibrates or "sequence_length" in section.calibration.model_fields_set:
        return recipe, ()
    from retrofit.data.calibration import within_positions

    calibration, notes = within_positions(section.calibration, positions)
    return recipe.model_copy(update={"convert": section.model_copy(update={"calibration": calibration})}), notes


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
    processes: int = 1,
    progress: Progress | None = None,
) -> ModelContext:
    """Open the model of a recipe and check everything. out: the folder of the run, or of the one step's result.

    alone: it is a command of one step. processes: that share the work. dry: the same checks, but nothing is fetched,
    converted or sampled: what is not on this machine yet is not looked at, which a note says. Raises UserError for
    whatever would fail later.
    """
    require_model(recipe)
    steps = steps_of(recipe)
    if not steps:
        raise UserError(
            "the recipe has no step", where=recipe.name, fix="add convert, window, context, recover or evaluate"
        )
    about = list(check_sources(dict.fromkeys(text for step in steps for text in step.texts)))
    for step in steps:
        about += step.check_options()
    context = open_model(recipe, revision=revision, original=original, alone=alone, progress=progress)
    recipe, steps = context.recipe, context.steps
    context.allow_extrapolation, context.throughput = allow_extrapolation, throughput or ASSUMED
    context.processes = processes
    context.notes += about
    require_record(context.model.path)
    here = check_model(context)
    if recipe.dtype not in ("auto", context.source.dtype) and recipe.convert is None and recipe.window is None:
        raise UserError(
            f"only `convert` and `window` write weights in another dtype, and these are {context.source.dtype}",
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
        todo = "converted" if context.source.kind == "gguf" else "downloaded"
        context.notes.append(f"the weights are not {todo} yet, and are checked when they are")
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
    from retrofit.data.samples import samples_folder
    from retrofit.data.texts import OWN_SAMPLES, own_samples

    context.tokenizer  # noqa: B018  a broken one raises before its texts are read
    for step in context.steps:
        context.notes += step.check_data(context, weights=weights, sample=sample)
    own = {text for text in context.texts() if text.source == OWN_SAMPLES} if weights else ()
    if not all(samples.complete for text in own for samples in own_samples(text, context.samples, "all")):
        require_writable(samples_folder())


def require_model(recipe: Recipe) -> str:
    """The model a recipe names; UserError when it names none."""
    if recipe.model is None:
        raise UserError("the recipe names no model", where="model", fix="add --model MODEL, or `model:` to the recipe")
    return recipe.model
