"""The price list of a model: for every possible number of KV heads, its KV cache and what it costs in quality.

One pass over the original gives the moments of every layer, from which the cost of every number of KV heads is
arithmetic. One or two numbers are then really converted, on the same few tokens and as `retrofit convert` does it
(repair included), and scored on sequences that the conversion did not see: the curve from cost to loss goes through
them. So the list says what a converted checkpoint has lost before any recovery.

All of it is kept on the way, layer by layer, in a folder beside the moments or in the cache: the same call resumes
one that was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.provenance import digest
from retrofit.checkpoint.staging import require_writable
from retrofit.data.calibration import check_calibration, within_positions
from retrofit.data.identity import content_digest, merged, require_distinct
from retrofit.data.texts import check_sources
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.format import duration, heads, nbytes
from retrofit.kv_heads.calibrate import moments as stored_moments
from retrofit.kv_heads.merge.folding import RotationAverages
from retrofit.kv_heads.sweep import pilot
from retrofit.kv_heads.sweep.budget import within
from retrofit.kv_heads.sweep.costs import LayerCost, probe_counts
from retrofit.kv_heads.sweep.price_list import PriceList, layerwise_costs, price_list
from retrofit.model.completeness import require_complete, require_sound
from retrofit.model.families import family_of
from retrofit.model.source import with_weights
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.kv_budget import Budget
from retrofit.recipe.schema import Calibration, Convert, Recipe, TextSource
from retrofit.system.world import ALONE, Others, World, led
from retrofit.workflow.checks import check_positions
from retrofit.workflow.estimate.cost import ASSUMED, DTYPE_BYTES, ModelFacts, Throughput
from retrofit.workflow.opening import open_model
from retrofit.workflow.plan import Plan, claimed_length, make_plan
from retrofit.workflow.samples import sampled_tokens
from retrofit.workflow.sweep_cache import measured

if TYPE_CHECKING:
    from retrofit.console import Progress

TOKENS = 16_384


def prices(
    recipe: Recipe,
    *,
    command: str,
    budget: Budget | None = None,
    tokens: int | None = None,
    moments: Path | None = None,
    revision: str | None = None,
    throughput: Callable[[], Throughput] = lambda: ASSUMED,
    also: pilot.Also | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> PriceList:
    """The price list of the recipe's model under the recipe's calibration and repair.

    command: what to type for `{kv_heads}` KV heads. tokens: of the calibration text, a third of it for scoring.
    moments: a folder of moments; they are read if it holds them and written otherwise, and so is what was measured. A
    call that was killed is resumed, in the folder `<moments>.work` or, without one, in the cache.
    throughput: asked only when there is an estimate to make. also: a further loss of the probes. world: the processes
    that make this call and share the passes over text.
    Raises UserError, before any long work, for a model or a budget with nothing to choose from.
    """

    def lead(others: Others) -> PriceList:
        usual: Any = {"revision": revision, "throughput": throughput, "also": also, "progress": progress}
        return _prices(recipe, command, budget, tokens, moments, world=world, others=others, **usual)

    def take_part(part: dict[str, Any]) -> None:
        pilot.measure(**{**part, "device": world.device(part["device"])}, world=world, progress=None)

    return led(world, lead, take_part)


def _prices(
    recipe: Recipe,
    command: str,
    budget: Budget | None,
    tokens: int | None,
    moments: Path | None,
    *,
    revision: str | None,
    throughput: Callable[[], Throughput],
    also: pilot.Also | None,
    world: World,
    others: Others,
    progress: Progress | None,
) -> PriceList:
    section = recipe.convert or Convert(kv_heads=1)
    # Which number of heads is wanted, and what is trained and measured afterwards, is not the list's business.
    alone = recipe.model_copy(
        update=dict.fromkeys(("convert", "window", "recover", "evaluate", "publish")) | {"require": {}}
    )
    context = open_model(alone, revision=revision, progress=progress)
    source, config, spec = context.source, context.config, context.spec
    alone = context.recipe
    notes = [*source.notes, *context.notes, *check_positions(context.model)]
    for step in context.steps:
        notes += step.check(context)
    counts = _possible(config, spec)
    value_bytes = DTYPE_BYTES[source.dtype if recipe.dtype == "auto" else recipe.dtype]
    length = budget.length if budget else claimed_length(alone, spec.max_position_embeddings)
    caches = {g: spec.with_kv_heads(g).kv_cache_bytes(length, value_bytes) for g in counts}
    chosen = within(budget, caches) if budget else None
    if section.method != "calibrated":
        notes.append(f"the recipe converts by `{section.method}`; these are the prices of `calibrated`")
    if length > claimed_length(alone, spec.max_position_embeddings):
        notes.append(f"{length:,} tokens lie beyond the model's {spec.max_position_embeddings:,} positions")
    read = moments is not None and stored_moments.saved(moments) == tuple(range(len(spec.layers)))
    if moments is not None:
        require_writable(moments)
        if not read:
            stored_moments.require_own(moments)
    total = tokens or min(TOKENS, section.calibration.tokens)
    asked = {"tokens": total, "text": merged(section.calibration.text)}
    calibration, shorter = within_positions(section.calibration.model_copy(update=asked), spec.max_position_embeddings)
    notes += shorter
    if moments is not None and read:
        source = with_weights(source, revision=revision or recipe.revision, progress=progress)
        options = pilot.options(section.model_copy(update={"calibration": calibration}), recipe.seed)
        read, changed = _still_of(moments, source.folder, calibration.text, options["text"])
        if read:  # what is measured anew is as if nothing had been there
            notes += changed
        for note in changed if progress else ():
            progress.note(note)  # type: ignore[union-attr]
    if not read:
        pilot.require_enough(calibration)
        require_distinct(calibration.text, "convert.calibration.text")
        for note in check_sources(calibration.text) if progress else ():
            progress.note(note)  # type: ignore[union-attr]
        check_calibration(calibration)
        if progress:
            _estimate(alone, section, calibration, context.facts, counts, throughput(), progress)
    source = with_weights(source, revision=revision or recipe.revision, progress=progress)
    if moments is not None and not read and (moments / stored_moments.ORIGIN).is_file():
        stored_moments.MomentsSource.of(moments, digest(source.folder))  # those of other weights are not replaced
    checkpoint = source.model.checkpoint
    require_complete(checkpoint, config, spec)
    source.hashed.update(require_sound(checkpoint, config, digested=source.unhashed))
    wanted = section.model_copy(update={"calibration": calibration, "method": "calibrated"})
    averages = RotationAverages(config)

    def price(folder: Path) -> list[Mapping[int, LayerCost]]:
        return layerwise_costs(source.model, spec, averages, counts, folder, progress)

    if moments is not None and read:
        calibrated, more = _read(moments, source.folder, pilot.options(wanted, recipe.seed))
        notes += more
        layers = price(moments)
    else:
        calibrated, layers = measured(
            recipe,
            wanted,
            source,
            counts,
            price,
            moments=moments,
            device=context.device,
            world=world,
            others=others,
            also=also,
            progress=progress,
        )
        notes += calibrated.notes
    listed, curve = price_list(spec, layers, calibrated, caches, value_bytes)
    if curve and curve.note:
        notes.append(curve.note)
    return PriceList(
        model=source.requested,
        length=length,
        prices=listed,
        calibrated=calibrated,
        curve=curve,
        budget=budget,
        kv_heads=chosen,
        command=None if chosen is None else command.replace("{kv_heads}", str(chosen)),
        notes=tuple(notes),
    )


def _still_of(moments: Path, folder: Path, text: Sequence[TextSource], asked: Any) -> tuple[bool, tuple[str, ...]]:
    """(whether the moments are of the text as it is now, notes). asked: the text in the words of the recipe.

    Another text by name is told by `probes.not_applied`. Raises UserError for moments of other weights.
    """
    origin, kept = stored_moments.MomentsSource.of(moments, digest(folder)), pilot.kept(moments)
    try:
        same = origin.content == content_digest(text)
    except UserError as error:
        return True, (f"the text cannot be compared with that of the moments in {shown(moments)}: {error.what}",)
    if kept is None:
        other = () if same or origin.content is None else (f"the moments in {shown(moments)} are of other text",)
        return True, other
    if same or kept.options.get("text") != asked:
        return True, ()
    return False, (f"the text has changed since the moments in {shown(moments)} were measured: measured anew",)


def _read(moments: Path, folder: Path, asked: Mapping[str, Any]) -> tuple[pilot.Calibrated | None, list[str]]:
    """What an earlier call or a conversion measured, and notes on it. folder: of the weights.

    Raises UserError for moments of other weights.
    """
    notes = []
    origin = stored_moments.MomentsSource.of(moments, digest(folder))
    if origin.stream != pilot.ORIGINAL:
        notes.append(
            f"the moments in {moments} are of a model {origin.stream} layer by layer: each layer is priced on what the "
            "converted ones before it gave"
        )
    calibrated = pilot.kept(moments)
    if calibrated is None:
        notes.append(f"no loss was measured beside the moments in {moments}: costs are shown, and no losses")
    else:
        notes += [*calibrated.notes, *pilot.not_applied(calibrated, asked, moments)]
    return calibrated, notes


def _possible(config: Any, spec: AttentionSpec) -> tuple[int, ...]:
    """Numbers of KV heads the model can have, its own included. Raises UserError where there is but one."""
    counts = tuple(c.kv_heads for c in family_of(config).conversions(spec) if c.possible)
    if counts == (spec.layers[0].kv_heads,):
        raise UserError(
            f"there is nothing to choose: the model has {heads(counts[0])} and can have no fewer",
            where="num_key_value_heads of config.json",
            fix="leave it as it is, or make its context longer: retrofit extend MODEL --factor 2 --out DIR",
        )
    return counts


def _estimate(
    recipe: Recipe,
    section: Convert,
    calibration: Calibration,
    facts: ModelFacts,
    counts: tuple[int, ...],
    throughput: Throughput,
    progress: Progress,
) -> None:
    """Say how long it takes."""

    def plan_of(calibration: Calibration) -> Plan:
        update = {"kv_heads": min(counts), "calibration": calibration, "method": "calibrated"}
        convert = section.model_copy(update=update)
        return make_plan(recipe.model_copy(update={"convert": convert, "context": None}), facts, throughput)

    whole = plan_of(calibration)
    # Sampling the original for the source `self` is done once, and kept.
    unsampled = plan_of(calibration.model_copy(update={"text": (TextSource(source="python-docs"),)}))
    probed = probe_counts(counts[:-1])
    # The original's pass with its moments is half of a conversion, each probe a whole one and its scoring.
    seconds = unsampled.seconds * (0.5 + len(probed) * 1.25) + whole.seconds - unsampled.seconds
    does = f"one pass over {calibration.tokens:,} tokens"
    sampled = sampled_tokens(calibration.text, calibration.tokens)
    if sampled:
        does += f" (of its own samples {sampled:,} are drawn first, and kept)"
    tried = " and ".join(heads(count) for count in probed)
    progress.note(
        f"about {duration(seconds)}: {does}, and probes with {tried} ({throughput.how}); until the list is whole, what "
        f"is done lies on disk, a checkpoint of at most {nbytes(facts.weight_bytes)} among it"
    )
