"""The measured points of a price list: really converted, on text that a part of was held out, and scored on that part.

What was measured is kept beside the moments, so that the same list needs no pass over text a second time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retrofit.checkpoint.copying import copy_file
from retrofit.console import to_json
from retrofit.data.calibration import CalibrationText
from retrofit.errors import UserError
from retrofit.format import heads
from retrofit.kv_heads.calibrate.layerwise_pass import layerwise_pass
from retrofit.kv_heads.calibrate.moments import PROBES, MomentsSource, layer_file, saved
from retrofit.kv_heads.convert import convert as convert_heads
from retrofit.kv_heads.sweep.costs import Measured
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Calibration, Convert
from retrofit.system.resume import Kept
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from retrofit.console import Progress

HELD_OUT = 3  # every third sequence of a kind is scored, and no conversion sees it
FILE = PROBES
ORIGINAL = "original"


@dataclass(frozen=True)
class Calibrated:
    """What was measured: mean loss of the original and of the probes beyond it, nats per token, on `scored_tokens`
    tokens of `kinds` that no conversion saw; converted on `tokens` tokens with `repair`. options: what was
    asked for. notes: what was not done as asked, and what the probes' conversions warn of."""

    original_loss: float
    probes: tuple[Measured, ...]
    repair: str
    tokens: int
    scored_tokens: int
    kinds: tuple[str, ...]
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Also:
    """A further loss of the original and of every probe. digest: of what it is measured on. loss: of a checkpoint, on a
    device; all processes make the call, which is pickled for them."""

    digest: str
    loss: Callable[[ModelFolder, str, World], float]


def options(section: Convert, seed: int) -> dict[str, Any]:
    """What decides about the numbers beside the weights, as JSON values."""
    calibration = section.calibration.model_dump(mode="json", exclude={"text"})
    text = [source.model_dump(exclude_defaults=True) for source in section.calibration.text]
    return {"text": text, **calibration, "repair": section.repair, "seed": seed}


def not_applied(calibrated: Calibrated, asked: Mapping[str, Any], folder: Path) -> list[str]:
    """A note on what is asked for now and is not what was measured, [] without a difference."""
    kept = calibrated.options
    differ = [
        f"{name} {_shown(kept.get(name))}, not {_shown(asked[name])}" for name in asked if kept.get(name) != asked[name]
    ]
    if not differ:
        return []
    return [
        f"the moments in {folder} were made with {'; '.join(differ)}: these are the prices of what was measured. "
        "Name another --moments folder to measure with the options of now"
    ]


def _shown(value: Any) -> str:
    return ", ".join(source["source"] for source in value) if isinstance(value, list) else str(value)


def require_enough(calibration: Calibration) -> None:
    """UserError unless every source gives enough sequences to hold some out."""
    total, length = sum(source.weight for source in calibration.text), calibration.sequence_length
    for source in calibration.text:
        share = source.weight / total
        count = math.ceil(max(length, round(calibration.tokens * share)) / length)
        if count < HELD_OUT:
            raise UserError(
                f"too few tokens: `{source.source}` would give {count} sequences, and {HELD_OUT} are needed to hold "
                "one out",
                where="--tokens",
                fix=f"give at least --tokens {math.ceil(((HELD_OUT - 1) * length + 1) / share)}",
            )


def split(text: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
    """(for conversion, for scoring): every `HELD_OUT`th sequence of each kind is for scoring."""
    seen: dict[str, int] = {}
    scored = []
    for index, kind in enumerate(text.kinds):
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] % HELD_OUT == 0:
            scored.append(index)
    assert min(seen.values()) >= HELD_OUT, "checked before"
    return _rows(text, [index for index in range(len(text.kinds)) if index not in set(scored)]), _rows(text, scored)


def _rows(text: CalibrationText, rows: list[int]) -> CalibrationText:
    return replace(text, input_ids_NT=text.input_ids_NT[rows], kinds=tuple(text.kinds[row] for row in rows))


def measure(
    folder: ModelFolder,
    section: Convert,
    fit: CalibrationText,
    scored: CalibrationText,
    counts: tuple[int, ...],
    *,
    moments: Path,
    work: Path,
    seed: int,
    device: str,
    identity: Mapping[str, str],
    also: Also | None = None,
    world: World = ALONE,
    progress: Progress | None,
) -> Calibrated:
    """Moments of the original into `moments`, and the loss of the probes beyond its own.

    work: a folder from which the next call with the same question resumes, layer by layer; the caller removes it.
    identity: digests of the weights, part of that question. also: measured of the original and the probes too. world:
    the processes that make this call, with the same arguments; passes over text are dealt out to them, and rank 0 alone
    writes checkpoints.
    """
    texts = {"fit": fit.digest(), "scored": scored.digest()}
    question = {"weights": identity, "device": torch.device(device).type, **texts, **options(section, seed)}
    question |= {"also": also.digest} if also else {}
    kept = Kept(work / "losses", question, world)
    if kept.discarded and progress:
        progress.note("what was kept of an earlier price list answers another question; measured anew")
    ids_NT = scored.input_ids_NT
    original = kept.values([ORIGINAL]).get(ORIGINAL)
    if original is None:
        losses_N = layerwise_pass(
            folder,
            ids_NT,
            measured=fit,
            moments=moments,
            averaged_tokens=section.calibration.averaged_tokens,
            device=device,
            work=work / ORIGINAL,
            world=world,
            task="moments of the original",
            progress=progress,
        )
        original = {"losses": losses_N.tolist(), "also": also.loss(folder, device, world) if also else None}
        if world.main:
            kept.put_values(ORIGINAL, original)
    _remove(work / ORIGINAL, world)
    before_N = torch.tensor(original["losses"], dtype=torch.float64)
    probes, notes = [], dict.fromkeys(fit.notes)
    for count in counts:
        probe, name = work / f"probe-{count}", f"probe-{count}"
        found = kept.values([name]).get(name)
        if found is None:
            found = _probe(folder, section, fit, ids_NT, count, probe, device, also, world, progress)
            if world.main:
                kept.put_values(name, found)
        _remove(probe, world)
        after_N = torch.tensor(found["losses"], dtype=torch.float64)
        warned = [note for note in found["notes"] if note not in fit.notes]
        notes |= dict.fromkeys(f"the probe with {heads(count)}, on two thirds of the text: {note}" for note in warned)
        increase_N = after_N - before_N
        error = float(increase_N.std() / math.sqrt(len(increase_N))) if len(increase_N) > 1 else math.nan
        further = found["also"] - original["also"] if also else None
        probes.append(Measured(count, float(increase_N.mean()), error, further))
    return Calibrated(
        original_loss=float(before_N.mean()),
        probes=tuple(probes),
        repair=section.repair,
        tokens=fit.input_ids_NT.numel(),
        scored_tokens=ids_NT.numel(),
        kinds=tuple(dict.fromkeys(scored.kinds)),
        options=options(section, seed),
        notes=tuple(notes),
    )


def _probe(
    folder: ModelFolder,
    section: Convert,
    fit: CalibrationText,
    scored_NT: torch.Tensor,
    count: int,
    work: Path,
    device: str,
    also: Also | None,
    world: World,
    progress: Progress | None,
) -> dict[str, Any]:
    """{"losses": of each scored sequence after a conversion to `count` KV heads, "notes": on that conversion, "also":
    the further loss}."""
    made = work / "checkpoint"
    if world.main:
        made.mkdir(parents=True, exist_ok=True)
    report = convert_heads(
        folder,
        made,
        kv_heads=count,
        method="calibrated",
        repair=section.repair,
        text=fit,
        averaged_tokens=section.calibration.averaged_tokens,
        device=device,
        work=work,
        world=world,
        progress=progress,
    )
    after_N = layerwise_pass(
        made,
        scored_NT,
        device=device,
        work=work / "scored",
        world=world,
        task=f"score {count} KV heads",
        progress=progress,
    )
    further = also.loss(ModelFolder(made), device, world) if also else None
    return {"losses": after_N.tolist(), "notes": list(report.notes), "also": further}


def _remove(folder: Path, world: World) -> None:
    """Remove what nobody reads any more."""
    if world.main:
        shutil.rmtree(folder, ignore_errors=True)


def keep(calibrated: Calibrated, moments: Path, folder: Path, origin: MomentsSource) -> None:
    """Copy the moments to `folder`, with what was measured beside them, and whose they are.

    The moments come last and one by one: until all are there, nothing is read from the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("layer-*.safetensors"):
        path.unlink()
    origin.write(folder)
    (folder / FILE).write_text(to_json(calibrated) + "\n", encoding="utf-8")
    for path in (layer_file(moments, layer) for layer in saved(moments)):
        partial = folder / f".{path.name}.partial"
        partial.unlink(missing_ok=True)
        copy_file(path, partial, link=True)  # the work folder goes when this is done
        partial.replace(folder / path.name)


def kept(folder: Path) -> Calibrated | None:
    """What was measured beside the moments in `folder`, None where nothing was."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = Calibrated(**record)
        probes = tuple(Measured(**{**p, "error": float(p["error"])}) for p in record["probes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"what was measured cannot be read: {error}",
            where=str(path),
            fix="measure again, into another --moments folder",
        ) from error
    return replace(found, probes=probes, kinds=tuple(found.kinds), notes=tuple(found.notes))
