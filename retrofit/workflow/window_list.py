"""The list of a model's windows: what each size and number of full layers would save and cost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.errors import UserError
from retrofit.model.cache import cache_dir
from retrofit.recipe.schema import Recipe
from retrofit.system.work_folder import held, kept, led_by_main, require_own
from retrofit.system.world import ALONE, World
from retrofit.windows.price_list import WindowList, lost_energy, sizes_within, window_prices
from retrofit.windows.selection import MOMENTS
from retrofit.workflow.estimate.cost import DTYPE_BYTES
from retrofit.workflow.opening_in_world import open_in
from retrofit.workflow.windowing import chosen_layers, length_of, target_of, texts_of

if TYPE_CHECKING:
    from retrofit.console import Progress

COMMAND = "plan"


def window_list(
    recipe: Recipe,
    *,
    command: str,
    moments: Path | None = None,
    revision: str | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> WindowList:
    """What windows cost the model of `recipe`, whose section `window` says of which size, fitted and measured how.

    command: what to type for `{layers}`, those that see everything. moments: a folder that keeps what was measured; the
    same call then reads no text. A call that was killed is resumed by the next one, there or in the cache. world: the
    processes that make this call and share the passes over text.
    Raises UserError, before any long work, for what `retrofit window` would refuse, and for layers that are named:
    there is nothing to choose then.
    """
    section = recipe.window
    assert section is not None
    if isinstance(section.full_layers, tuple) or section.full_layers == 0:
        raise UserError(
            "the list says which layers would see everything, and these are named",
            where="window.full_layers",
            fix="give their number, or leave it out",
        )
    context = open_in(world, recipe, revision=revision, alone=True, progress=progress)
    source, spec = context.model, context.spec
    target = target_of(section, context.config, spec)
    asked = json.dumps([context.source.digests, section.model_dump(mode="json"), recipe.seed], sort_keys=True)
    work = moments or cache_dir() / f"windows-{hashlib.sha256(asked.encode()).hexdigest()[:24]}.work"
    work, keeping = world.share(work), held if moments else kept
    world.only(lambda: require_own(work, COMMAND, option="--moments"))
    with led_by_main(world, lambda: folder_lock(work), lambda: keeping(work, COMMAND)), writing(work):
        texts = texts_of(section, context, source, recipe.seed)
        sizes = sizes_within(length_of(section, context.native), section.size, spec)
        choice = chosen_layers(section, target, source, texts, context, work, sizes)
        if choice is None:
            raise UserError(
                "there is nothing to choose: every layer has a window already",
                where="sliding_window of config.json",
                fix="make them shorter: retrofit window MODEL --size N --out DIR",
            )
        layers = [*target.candidates, *target.always]
        lost = world.only(lambda: lost_energy(work / MOMENTS, layers, sinks=target.sinks))
    value_bytes = DTYPE_BYTES[context.source.dtype if recipe.dtype == "auto" else recipe.dtype]
    full = ",".join(map(str, choice.full)) + ("," if len(choice.full) == 1 else "")
    return WindowList(
        model=context.source.requested,
        target=target.family,
        size=section.size,
        prices=window_prices(spec, choice, target.candidates, target.always, section.size, lost, value_bytes),
        choice=choice,
        tokens=texts.fit.input_ids_NT.numel(),
        kinds=tuple(texts.fit.tokens_by_kind),
        measured_tokens=texts.rows.input_ids_NR.numel(),
        command=command.replace("{layers}", full or "0"),
        notes=tuple(dict.fromkeys((*context.notes, *texts.fit.notes))),
    )
