"""What a price list measures, kept on the way: the same call resumes one that was killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.provenance import digest
from retrofit.data.calibration import calibration_text
from retrofit.data.identity import identity
from retrofit.kv_heads import VERSION
from retrofit.kv_heads.calibrate.moments import MomentsSource
from retrofit.kv_heads.disk import require_room
from retrofit.kv_heads.room import held, room_needed, survey_room
from retrofit.kv_heads.sweep import pilot
from retrofit.kv_heads.sweep.costs import LayerCost, probe_counts
from retrofit.model.cache import cache_dir
from retrofit.model.folder import ModelFolder
from retrofit.model.source import Source
from retrofit.recipe.schema import Convert, Recipe
from retrofit.system.resume import ResumeKey
from retrofit.system.work_folder import kept, require_own
from retrofit.system.world import Others, World
from retrofit.workflow.samples import samples_of

if TYPE_CHECKING:
    from retrofit.console import Progress

COMMAND = "plan"


def measured(
    recipe: Recipe,
    section: Convert,
    source: Source,
    counts: tuple[int, ...],
    price: Callable[[Path], list[Mapping[int, LayerCost]]],
    *,
    moments: Path | None,
    device: str,
    world: World,
    others: Others,
    also: pilot.Also | None = None,
    progress: Progress | None,
) -> tuple[pilot.Calibrated, list[Mapping[int, LayerCost]]]:
    """What was measured under `section`, and what `price` makes of the folder of the original's moments.

    counts: possible numbers of KV heads, the model's own last. moments: where moments and measurements are kept.
    others: the other processes of `world`, which take part in `pilot.measure`. also: a further loss of the probes.
    Raises UserError, before anything is read or sampled, where the disk has no room for what lies there meanwhile.
    """
    folder, work = source.folder, work_folder(moments, source)
    question = [pilot.options(section, recipe.seed), device]
    inputs = {"checkpoint": dict(source.digests), "text": identity(section.calibration.text)}
    own = work / ResumeKey(COMMAND, str(VERSION), question, inputs).digest[:16]
    require_own(work, COMMAND)
    with folder_lock(work), kept(work, COMMAND), writing(moments or work):
        require_room(own, room(source.model, section, counts) - held(own))
        text = calibration_text(
            section.calibration,
            source.model.tokenizer,
            seed=recipe.seed,
            teacher=samples_of(recipe.model_copy(update={"convert": section}), source.model, device),
            progress=progress,
        )
        fit, scored = pilot.split(text)
        part: dict[str, Any] = {
            "folder": source.model,
            "section": section,
            "fit": fit,
            "scored": scored,
            "counts": probe_counts(counts[:-1]),
            "moments": own / "moments",
            "work": own,
            "seed": recipe.seed,
            "device": device,
            "identity": dict(source.digests),
            **({"also": also} if also else {}),
        }
        with others.join(part):
            calibrated = pilot.measure(**part, world=world, progress=progress)
        layers = price(own / "moments")
        if moments is not None:
            origin = MomentsSource(digest(folder), pilot.ORIGINAL, text.content)
            pilot.keep(calibrated, own / "moments", moments, origin)
    return calibrated, layers


def work_folder(moments: Path | None, source: Source) -> Path:
    """Where a price list is kept until it is whole: beside its moments, else in the cache, by the model's weights."""
    if moments is not None:
        place = moments.resolve()  # a link: beside what it points to
        return place.with_name(f"{place.name}.work")
    key = hashlib.sha256(json.dumps(source.digests, sort_keys=True).encode()).hexdigest()
    return cache_dir() / f"prices-{key[:24]}.work"


def room(model: ModelFolder, section: Convert, counts: tuple[int, ...]) -> int:
    """The most bytes on disk at a time: the original's moments, and beside them its own pass or a probe's."""
    spec, calibration = model.spec, section.calibration
    tokens = calibration.tokens + len(calibration.text) * calibration.sequence_length  # sequences are whole
    alone = survey_room(spec, tokens, moments=False)
    probe = room_needed(
        spec,
        max(probe_counts(counts[:-1])),
        tokens,
        repairs=section.repair != "none",
        moments=False,
        value_bytes=model.dtype().itemsize,
        checkpoint_bytes=model.checkpoint.nbytes + alone,
    )
    return survey_room(spec, 0, moments=True) + max(alone, probe)
