"""What a recipe asks for against itself and against the model's configuration: before any text or weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrofit.checkpoint.config import read_config
from retrofit.checkpoint.files import holds_weights
from retrofit.checkpoint.read import Checkpoint
from retrofit.context import rope
from retrofit.context.lint import require_clean
from retrofit.context.search.candidates import candidates, rungs
from retrofit.data.calibration import check_calibration
from retrofit.data.identity import require_distinct
from retrofit.data.sources import kind_of
from retrofit.data.texts import OWN_SAMPLES, check_sources
from retrofit.errors import UserError
from retrofit.evaluation.long_context import longest_prompt
from retrofit.evaluation.scoring.reader import require_positions
from retrofit.format import nbytes
from retrofit.kernels.registry import choose
from retrofit.model.completeness import require_complete
from retrofit.model.families import family_of
from retrofit.model.load import resolve_dtype, working_dtype
from retrofit.model.side_files import side_file
from retrofit.model.source import Source
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Context, Recipe, TextSource
from retrofit.recovery.schedule import check_lengths
from retrofit.recovery.student_teacher import compute_dtype, training_kernel
from retrofit.system.memory import total_memory
from retrofit.workflow.plan import Plan, claimed_length

_SURE = 2
"""A step is refused when its estimate is so many times the memory of the machine: estimates are no measurements."""


def all_texts(recipe: Recipe) -> tuple[TextSource, ...]:
    """Every text that a run reads."""
    convert, recover, evaluate = recipe.convert, recipe.recover, recipe.evaluate
    calibration = convert.calibration.text if convert and convert.calibrates else ()
    search = recipe.context.searches if recipe.context else None
    return (*calibration, *(text for section in (search, recover, evaluate) if section for text in section.text))


def check_texts(recipe: Recipe) -> tuple[str, ...]:
    """Every text can be read, and no two of a section are taken for one. Returns notes on what is left out of them."""
    convert, recover, evaluate = recipe.convert, recipe.recover, recipe.evaluate
    if convert and convert.calibrates:
        require_distinct(convert.calibration.text, "convert.calibration.text")
    if recover:
        require_distinct(recover.text, "recover.text")
    if evaluate:
        require_distinct(evaluate.text, "evaluate.text")
    notes = check_sources(dict.fromkeys(all_texts(recipe)))
    return (*notes, *(check_calibration(convert.calibration) if convert and convert.calibrates else ()))


def check_require(recipe: Recipe) -> None:
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
        if finding.severity == "error":
            raise UserError(finding.what, where=f"config.json: {finding.where}", fix=finding.fix)
        notes.append(f"{finding.where}: {finding.what}")
    if recipe.context:
        for name in rope.SIDE_FILES:
            side_file(folder, name)
        notes += _check_context(recipe.context, config, claimed)
    if recipe.evaluate:
        _check_lengths(recipe, config, spec, claimed, beyond=beyond)
    if recipe.recover:
        _require_within(recipe.recover.sequence_length, claimed, "recover.sequence_length")
        check_lengths(recipe.recover, spec.max_position_embeddings, claimed)
        if recipe.recover.adapter.rank > spec.hidden_size:
            raise UserError(
                f"an adapter of rank {recipe.recover.adapter.rank} is larger than the layers, which are "
                f"{spec.hidden_size} wide",
                where="recover.adapter.rank",
                fix=f"use at most {spec.hidden_size}",
            )
    if recipe.convert and recipe.convert.calibrates:
        length = recipe.convert.calibration.sequence_length
        _require_within(length, spec.max_position_embeddings, "convert.calibration.sequence_length", extendable=False)
    return tuple(notes)


def _check_lengths(recipe: Recipe, config: Any, spec: AttentionSpec, claimed: int, *, beyond: bool) -> None:
    """What is evaluated fits the windows: of the last model, and of the original where its positions are learned."""
    evaluate = recipe.evaluate
    assert evaluate
    longest = longest_prompt(evaluate)
    if not beyond:
        _require_within(longest, claimed, "evaluate.lengths")
        require_positions(config, longest, "evaluate.lengths, for the original model")
    if spec.learned_positions and evaluate.cost_lengths and evaluate.decode_tokens >= spec.max_position_embeddings:
        raise UserError(
            f"{evaluate.decode_tokens} decoded tokens have no place in {spec.max_position_embeddings} positions",
            where="evaluate.decode_tokens",
            fix=f"use fewer than {spec.max_position_embeddings}, or cost_lengths: []",
        )


def _findings(config: Any, folder: Path) -> list[rope.Finding]:
    """Of the linter on config.json as it is stored, where a gap is still seen, and on what became of it."""
    stored = [*rope.recorded(folder, config), *rope.lint(read_config(folder), config)]
    known = {(finding.rule, finding.where) for finding in stored}
    return [*stored, *(finding for finding in rope.lint(config) if (finding.rule, finding.where) not in known)]


def check_headers(recipe: Recipe, config: Any, spec: AttentionSpec, folder: Path) -> bool:
    """Whether the folder holds weights already; they are checked then, by their headers alone. Raises UserError for
    weights that are not what the configuration says."""
    if not holds_weights(folder):
        return False
    by_name = recipe.convert or recipe.recover or recipe.context
    require_complete(Checkpoint.open(folder), config, spec if by_name else None)
    return True


def _check_context(context: Context, config: Any, claimed: int) -> tuple[str, ...]:
    """Notes on an extension that is possible. Raises UserError otherwise."""
    search, method = context.searches, str(context.method)
    if search:
        rungs(claimed, search.tokens_for(claimed))
        method = candidates(config, length=claimed, count=1, portable=search.portable)[0].method
    how: dict[str, Any] = {"length": context.length, "factor": context.factor, "settings": context.settings}
    encoded, planned = rope.extend_and_plan(config, method=method, **how)
    require_clean(rope.lint(encoded), "context")
    return () if search else planned.notes


def _require_within(length: int, claimed: int, where: str, *, extendable: bool = True) -> None:
    if length > claimed:
        longer = f", or extend the model with `context: {{length: {length}}}`" if extendable else ""
        raise UserError(
            f"{length} tokens are more than the {claimed} positions of the model",
            where=where,
            fix=f"ask for at most {claimed}{longer}",
        )


def check_kernels(recipe: Recipe, source: Source, spec: AttentionSpec, device: str) -> None:
    """Every step has a kernel for what it does, in the dtype that it will do it in. UserError otherwise."""

    def name(dtype: str) -> str:
        working = working_dtype(dtype, source.folder, device)
        return source.dtype if working == "auto" else working

    if recipe.evaluate:
        choose(recipe.kernel, spec, device, dtype=name(recipe.evaluate.dtype))
        if recipe.convert and recipe.evaluate.dtype == "auto" and recipe.dtype != "auto" and device != "cpu":
            choose(recipe.kernel, spec, device, dtype=recipe.dtype)
    if recipe.context and recipe.context.searches:
        choose(recipe.kernel, spec, device, dtype=name("auto"))
    if recipe.recover:
        dtype = str(compute_dtype(device)).removeprefix("torch.")
        training_kernel(recipe.kernel, spec, device, dtype, documents=recipe.recover.document_masking)
    resolve_dtype(recipe.dtype, source.folder)


def check_memory(plan: Plan, device: str) -> tuple[str, ...]:
    """A note on every step that needs more memory than there is; UserError where it is certain that it has no room."""
    total = total_memory(device)
    if total is None:
        return ()
    notes = []
    for cost in plan.steps:
        if cost.peak_bytes > _SURE * total:
            raise UserError(
                f"`{cost.step}` needs about {nbytes(cost.peak_bytes)} of memory, and this machine has {nbytes(total)}",
                where=cost.step,
                fix="ask for fewer tokens, shorter lengths or smaller batches, or use a larger machine",
            )
        if cost.peak_bytes > total:
            notes.append(
                f"`{cost.step}` may need {nbytes(cost.peak_bytes)} of memory; this machine has {nbytes(total)}"
            )
    return tuple(notes)


def own_samples_in(recipe: Recipe) -> bool:
    """Whether any step reads what the original model writes."""
    return any(source.source == OWN_SAMPLES for source in all_texts(recipe))
