"""Everything that can be wrong with a run is found here, before anything is written: cheap checks first.

What comes back holds all that the steps need to know of the recipe, the source model and this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.extensions import require_record
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.staging import require_free_space, require_writable
from retrofit.data.documents import Document
from retrofit.data.measured import read_before, recorded_text, scored_documents
from retrofit.data.packing import CHARS_PER_TOKEN
from retrofit.data.samples import Teacher
from retrofit.data.search_text import LONG_SEARCH
from retrofit.data.texts import OWN_SAMPLES
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.evaluation.long_context import definitions_of
from retrofit.evaluation.tasks.harness import Harness, open_tasks, require_harness
from retrofit.kernels.registry import Choice, choose
from retrofit.kv_heads.disk import require_room
from retrofit.kv_heads.room import held, room_needed
from retrofit.model import source as sources
from retrofit.model.completeness import require_sound
from retrofit.model.families import describe
from retrofit.model.inspect import count_parameters
from retrofit.model.load import load_config, load_tokenizer, resolve_device, resolve_dtype
from retrofit.model.source import Source
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Recipe, TextSource
from retrofit.workflow.estimate.flops import ASSUMED, ModelFacts, TaskSize, Throughput
from retrofit.workflow.journal import is_run
from retrofit.workflow.plan import (
    FOLDERS,
    MOST_SAMPLED,
    SAMPLED_TOKENS,
    Plan,
    claimed_length,
    make_plan,
    sampled_tokens,
    steps_of,
)
from retrofit.workflow.publish_checks import check_publish, snippet_of
from retrofit.workflow.recipe_checks import (
    all_texts,
    check_headers,
    check_kernels,
    check_memory,
    check_require,
    check_surgery,
    check_texts,
)
from retrofit.workflow.task_checks import check_tasks
from retrofit.workflow.text_checks import check_reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    dry: bool = False,
    beyond: bool = False,
    throughput: Throughput | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Check a run and gather what it needs. weights=False stops before weights and texts are fetched or read. beyond:
    lengths may be longer than the window. dry: the same checks, but nothing is fetched, converted or sampled: what is
    not on this machine yet is not looked at, which a note says.

    Raises UserError for whatever would fail later.
    """
    model = require_model(recipe)
    if not steps_of(recipe):
        raise UserError("the recipe has no step", where=recipe.name, fix="add convert, context, recover or evaluate")
    about_texts = check_texts(recipe)
    check_require(recipe)
    if recipe.evaluate and recipe.evaluate.tasks:
        require_harness()
    device = resolve_device(recipe.device)
    source = sources.resolve(model, revision=revision or recipe.revision, weights=False, progress=progress)
    config = load_config(source.folder)
    require_record(source.folder)
    spec = describe(config)
    found = check_surgery(recipe, config, spec, source.folder, beyond=beyond)
    here = check_headers(recipe, config, spec, source.folder)
    found = (*about_texts, *found)
    if recipe.dtype not in ("auto", source.dtype) and recipe.convert is None:
        raise UserError(
            f"only `convert` writes weights in another dtype, and these are {source.dtype}",
            where="dtype",
            fix="write dtype: auto",
        )
    check_publish(recipe, source, config)
    kernel = choose(recipe.kernel, spec, device)
    check_kernels(recipe, source, spec, device)
    harness = tasks_of(recipe)
    if harness is not None:
        check_tasks(recipe, harness, config, kernel.name)
    plan = make_plan(recipe, facts_of(source, config, spec), throughput or ASSUMED, sizes(harness))
    found = (*found, *check_memory(plan, device))
    if out is not None:
        missing = sum(cost.disk_bytes for cost in plan.steps if not (out / FOLDERS[cost.step]).exists())
        require_free_space(out, int(missing * _SPARE))
    if not weights:
        return Prepared(recipe, source, spec, plan, device, kernel, (), (*source.notes, *found), harness)
    if not dry:
        source = sources.resolve(model, revision=revision or recipe.revision, progress=progress)
    if not dry and not here:
        here = check_headers(recipe, config, spec, source.folder)
    if here:
        _check_weights(recipe, source, config, spec, out)
    else:
        found = (*found, "the weights are not on this machine: they are checked when they are")
    read = read_before(recipe.evaluate.text if recipe.evaluate else (), source.folder)
    tokenizer = load_tokenizer(source.folder) if reads_tokens(recipe) else None
    if tokenizer is not None:
        check_reading(recipe, spec, tokenizer, teacher_of(recipe, source.folder, device), weights=here)
        if recipe.publish:
            snippet_of(tokenizer, config, source.folder)
    left_out: list[str] = []
    positions = spec.max_position_embeddings
    documents = _documents(recipe, source, device, tuple(read), positions, left_out, tokenizer, sample=not dry)
    found = (*found, *read.values(), *left_out)
    for note in found if progress and not dry else ():
        progress.note(note)  # type: ignore[union-attr]
    return Prepared(recipe, source, spec, plan, device, kernel, documents, (*source.notes, *found), harness)


def reads_tokens(recipe: Recipe) -> bool:
    """Whether any step reads text."""
    return bool(all_texts(recipe)) or recipe.publish is not None


def _check_weights(recipe: Recipe, source: Source, config: Any, spec: AttentionSpec, out: Path | None) -> None:
    """The weights are finite in the dtype they will be written in, a head that is stored beside the embedding it is
    tied to equals it, and a conversion of them has room."""
    written = resolve_dtype(recipe.dtype, source.folder)
    checkpoint = Checkpoint.open(source.folder)
    require_sound(checkpoint, config, written=None if recipe.dtype == "auto" else written)
    convert = recipe.convert
    if out is None or convert is None or not convert.calibrates or convert.kv_heads == spec.layers[0].kv_heads:
        return
    if not (out / FOLDERS["convert"]).exists():
        calibration = convert.calibration
        needed = room_needed(
            spec,
            convert.kv_heads,
            calibration.tokens + len(calibration.text) * calibration.sequence_length,  # sequences are whole
            repairs=convert.repair != "none",
            moments=False,
            value_bytes=written.itemsize,
            checkpoint_bytes=checkpoint.nbytes,
        )
        begun = (out / f"{FOLDERS['convert']}.work", out.with_name(f"{out.name}.work"))
        require_room(out, needed - sum(held(work) for work in begun if work.is_dir()))


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
    if out.is_dir() and not is_run(out) and any(out.iterdir()):
        raise UserError("the folder holds something that is not a run", where=shown(out), fix="give another --out")


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


def _documents(
    recipe: Recipe,
    source: Source,
    device: str,
    read: tuple[TextSource, ...],
    positions: int,
    notes: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    sample: bool,
) -> tuple[Document, ...]:
    """read: sources that earlier steps of the model have read. positions: of the model. notes: gets what was left out
    and why. sample: the model may be asked to write its own."""
    evaluate = recipe.evaluate
    if evaluate is None:
        return ()
    assert tokenizer is not None
    trained_on = (*all_texts(recipe.model_copy(update={"evaluate": None})), *read)
    teacher = teacher_of(recipe, source.folder, device)
    text = [one for one in evaluate.text if sample or one.source != OWN_SAMPLES]
    if not text:
        return ()
    documents = scored_documents(
        text,
        tokenizer,
        length=max(*evaluate.lengths, evaluate.document_tokens or 0),
        count=evaluate.documents,
        trained_on=trained_on,
        also_read=recorded_text(source.folder),
        teacher=teacher,
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
