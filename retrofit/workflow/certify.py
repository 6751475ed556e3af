"""`retrofit certify`: a folder that this program wrote becomes one that can be published; its weights stay as they are.

It is measured, with its original where that is given, loaded again in a fresh process, and gets a card and a whole
record.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.provenance import FILE, digest, read_provenance, sha256, write_provenance
from retrofit.checkpoint.staging import beside, name_file, put_file, require_writable
from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.evaluation.long_context import native_length
from retrofit.evaluation.result import ModelEvaluation
from retrofit.publishing.card import render_card
from retrofit.publishing.engines.trial import EngineTrial, require_engines
from retrofit.publishing.gguf.writing import report_of
from retrofit.publishing.reload import ReloadReport
from retrofit.recipe.hub import OTHER, is_repo_id, license_problem
from retrofit.recipe.schema import Publish, Recipe
from retrofit.report.data import RunData
from retrofit.windows.outcome import WindowReport
from retrofit.workflow.artifact import Artifact, Provenance
from retrofit.workflow.card import recorded_changes
from retrofit.workflow.command import measured
from retrofit.workflow.context import ModelContext
from retrofit.workflow.journal import CARD, is_run
from retrofit.workflow.opening import open_context
from retrofit.workflow.proven import Proven, prove, record_of, with_gguf
from retrofit.workflow.public import public_model
from retrofit.workflow.reporting import command
from retrofit.workflow.steps.evaluate import Evaluate

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.model.source import Source

WRITTEN = "card"  # key of the record: sha256 of the card as it was written
_LABELS = {"convert": "converted", "window": "converted", "extend": "extended", "recover": "recovered"}
_SECTIONS = {"convert": "convert", "window": "window", "extend": "context", "recover": "recover"}


@dataclass(frozen=True)
class Certified:
    """A folder that can be published. models: by label, what was measured. metrics: by name, as `require` knows them.

    card: its README.md. engines: what other engines gave.
    """

    folder: Path
    card: Path
    models: Mapping[str, ModelEvaluation]
    metrics: Mapping[str, float]
    reload: ReloadReport
    engines: tuple[EngineTrial, ...] = ()


def require_certifiable(folder: Path, *, original: str | None, overwrite: bool) -> dict[str, Any]:
    """The record of a folder that a command of this program wrote, outside a run. Raises UserError for any other, for
    one that was changed since, and for a card that somebody else wrote. Torch-free."""
    if not folder.is_dir():
        raise UserError("there is no such folder", where=shown(folder), fix="give a folder that `retrofit` wrote")
    parent = folder.absolute().parent
    if is_run(folder) or is_run(parent):
        raise UserError(
            "a run proves and publishes what it wrote by itself",
            where=shown(folder),
            fix=f"publish the run: retrofit publish {shell_word(folder if is_run(folder) else folder.parent)} "
            "--repo OWNER/NAME, or copy the folder out of it",
        )
    if not (folder / FILE).is_file():
        raise UserError(
            f"the folder holds no {FILE}: this program did not write it, and cannot say how it was made",
            where=shown(folder),
            fix="give a folder that retrofit convert, extend or recover wrote",
        )
    record = read_provenance(folder)
    require_writable(folder)
    written = record.get("files")
    if written and written != digest(folder, everything=True):
        raise UserError(
            "files of this folder were changed, added or removed after they were written",
            where=shown(folder),
            fix="move what was added elsewhere, or write the folder again",
        )
    card = folder / CARD
    if os.path.lexists(card) and not overwrite and not (card.is_file() and sha256(card) == record.get(WRITTEN)):
        raise UserError(
            "the folder has a card that was not written here, or was edited",
            where=shown(card),
            fix="move it elsewhere, or add --overwrite to replace it",
        )
    if original is None and any(step["step"] in ("convert", "window") for step in record.get("steps") or ()):
        raise UserError(
            "the attention of this folder is not that of the model it was made from, which its card compares it with",
            where=shown(folder),
            fix="add --original MODEL, the model before the conversion",
        )
    return record


def certify(
    recipe: Recipe,
    folder: Path,
    *,
    original: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Certified:
    """Measure `folder` as `evaluate` of the recipe says, prove it, and write its card and record. original: the model
    before the surgery. overwrite: a card that somebody else wrote is replaced.

    Raises UserError as `require_certifiable` does, for what cannot be measured or published, and where a fresh process
    does not reproduce the losses; the folder is as it was then.
    """
    record = require_certifiable(folder, original=original, overwrite=overwrite)
    steps, came = tuple(record.get("steps") or ()), record.get("source") or {}
    assert recipe.publish is not None
    section = _identity(came, recipe.publish)
    again = " ".join([f"retrofit certify {shell_word(folder)}", *(f"--engine {name}" for name in section.engines)])
    require_engines(section.engines, make=section.make_environments, command=f"{again} --make-environment")
    recipe = recipe.model_copy(update={"model": str(folder), "publish": section})
    with folder_lock(folder), writing(folder):
        context = open_context(recipe, original=original, alone=True, progress=progress)
        [step] = [one for one in context.steps if isinstance(one, Evaluate)]
        last = next((_LABELS[one["step"]] for one in reversed(steps) if one["step"] in _LABELS), "model")
        models = {last: replace(context.artifact(), provenance=Provenance(came, steps))}
        if original is not None:
            before = context.original_source
            _require_same_original(came, before)
            models = {"original": Artifact(before.model, before.digests, Provenance.of(before)), **models}
        kept = {label: measured(context, step, label, artifact, None) for label, artifact in models.items()}
        result = step.result(context, models, kept)
        made, commands = _made(context, steps, _source(context, came))
        data = RunData(
            name=made.recipe.name,
            models=result.models,
            native_length=native_length(context.model),
            claimed_length=context.native,
            kernel=result.proof.kernel,
            windows=_windows(steps),
            commands=commands,
        )
        changes = recorded_changes(steps)
        proven = prove(made, models[last], folder, section, data, changes, kept[last].losses)
        proven = _with_earlier(record, section, proven)
        with beside(folder, "gguf") as place:
            proven = with_gguf(made, folder, section, proven, place)
            for path in sorted(place.iterdir()):
                name_file(path, folder / path.name, overwrite=path.name in (record.get("files") or ()))
        new = dict(record_of(made, models[last], folder, proven, result, ()))
        _write(folder, {**record, **new}, proven.text)
    return Certified(
        folder=folder,
        card=folder / CARD,
        models={model.label: model for model in result.models},
        metrics=result.metrics,
        reload=proven.reload,
        engines=proven.engines,
    )


def _require_same_original(came: Mapping[str, Any], given: Source) -> None:
    """UserError unless the model has the weights that the folder was made from, where it records them."""
    recorded = came.get("digests")
    if not isinstance(recorded, dict):
        return
    weights = {name: value for name, value in recorded.items() if Path(name).suffix == ".safetensors"}
    found = {name: value for name, value in given.digests.items() if Path(name).suffix == ".safetensors"}
    if weights and weights != found:
        raise UserError(
            f"`{shown(given.requested)}` is not the model that this folder was made from: its weights are others",
            where="--original",
            fix=f"give {shown(came['model'])}, as it was then" if came.get("model") else "give that model",
        )


def _with_earlier(record: Mapping[str, Any], section: Publish, proven: Proven) -> Proven:
    """The same with the GGUF files that the folder holds already, where no others are asked for."""
    if section.gguf or not record.get("gguf"):
        return proven
    report = report_of(record["gguf"])
    card = replace(proven.card, gguf=report)
    return replace(proven, card=card, text=render_card(card))


def _identity(came: Mapping[str, Any], section: Publish) -> Publish:
    """The section with the license and base model that the folder records; what the hub does not accept is left for
    publishing to ask."""
    base, license = came.get("base_model"), came.get("license")
    usable = isinstance(license, str) and license != OTHER and license_problem(license) is None
    known = isinstance(base, str) and is_repo_id(base)
    return section.model_copy(update={"license": license if usable else None, "base_model": base if known else None})


def _source(context: ModelContext, came: Mapping[str, Any]) -> Source:
    """The model before the surgery, under the name that the folder records."""
    before = context.original_source
    name, revision = came.get("model"), came.get("revision")
    return replace(
        before,
        requested=name if isinstance(name, str) else before.requested,
        repo_id=name if came.get("kind") == "hub" and isinstance(name, str) else None,
        revision=revision if isinstance(revision, str) else None,
    )


def _made(
    context: ModelContext, steps: tuple[Mapping[str, Any], ...], source: Source
) -> tuple[ModelContext, tuple[str, ...]]:
    """The context of a run that would make the folder, and what to type for it; where the recorded steps are no row of
    one recipe, they stand in the record alone."""
    here = replace(context, source=source)
    names = [step["step"] for step in steps if step["step"] in _SECTIONS]
    sections = {_SECTIONS[step["step"]]: step.get("config") for step in steps if step["step"] in _SECTIONS}
    if names == [name for name in _SECTIONS if name in names]:
        values = {**context.recipe.model_dump(mode="json"), **sections, "model": public_model(source)}
        try:
            recipe = Recipe.model_validate(values)
        except ValidationError:
            pass  # of another version
        else:
            return replace(here, recipe=recipe), (command(recipe, source),)
    return here, (f"retrofit certify {shell_word(Path(context.source.requested).name)}",)


def _windows(steps: tuple[Mapping[str, Any], ...]) -> dict[str, Any] | None:
    """What the card says of sliding windows, from their record; None where it is none of this version."""
    step = _last(steps, "window")
    try:
        found = TypeAdapter(WindowReport).validate_python((step or {}).get("result"))
    except ValidationError:
        return None
    return asdict(found)


def _last(steps: tuple[Mapping[str, Any], ...], name: str) -> Mapping[str, Any] | None:
    return next((one for one in reversed(steps) if one["step"] == name), None)


def _write(folder: Path, record: Mapping[str, Any], card: str) -> None:
    """Card and record, each whole or not at all."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / CARD).write_text(card, encoding="utf-8")
        path = write_provenance(place, {**record, WRITTEN: sha256(Path(place) / CARD)})
        put_file(folder / FILE, path.read_bytes(), overwrite=True)
        put_file(folder / CARD, card.encode(), overwrite=True)
