"""The steps that make checkpoints: each takes the newest checkpoint of a run and gives the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrofit.data.identity import identity
from retrofit.kv_heads.calibrate import moments as stored_moments
from retrofit.recipe.schema import Context, Convert, Recipe, Recover
from retrofit.workflow import operations
from retrofit.workflow.journal import fingerprint
from retrofit.workflow.plan import FOLDERS
from retrofit.workflow.runner import VERSIONS, Runner, State

MOMENTS = "moments"


def convert(runner: Runner, state: State, section: Convert) -> State:
    """Fewer KV heads; it goes on from its last own layer and shard after a kill. The moments stay in the run folder."""
    prepared, recipe = runner.prepared, runner.prepared.recipe
    scratch = f"{FOLDERS['convert']}.work"
    work_folder, moments = runner.folder / scratch, runner.folder / MOMENTS
    config = {**_dump(section), **_common(recipe)}
    text = identity(section.calibration.text) if section.calibrates else None
    # Keys are merged for the rotations that the run ends with.
    context = recipe.context if section.calibrates and recipe.context and not recipe.context.searches else None
    inputs = {"checkpoint": state.identity, "text": text, "context": context and _dump(context)}

    def work(path: Path) -> Mapping[str, Any]:
        if section.calibrates:
            stored_moments.require_own(moments)
        report = operations.convert(
            state.path,
            path,
            section,
            state.origin,
            teacher=prepared.teacher,
            dtype=recipe.dtype,
            device=prepared.device,
            seed=recipe.seed,
            work=work_folder / fingerprint("convert", VERSIONS["convert"], config, inputs)[:16],
            moments=moments if section.calibrates else None,
            context=context,
            max_shard_size=shard_size(recipe),
            overwrite=True,
            progress=runner.progress,
        )
        if not section.calibrates and runner.journal.claims(MOMENTS):
            stored_moments.remove(moments)  # those of a recipe before
        return operations.facts(report)

    measured = (MOMENTS,) if section.calibrates else ()
    entry = runner.step("convert", FOLDERS["convert"], config, inputs, work, scratch=(scratch, *measured))
    runner.drop(scratch)
    return runner.made(entry, state.origin.after("convert", _dump(section), entry.result))


def extend(runner: Runner, state: State, section: Context) -> State:
    """A longer window; a search goes on after its last own trial after a kill."""
    prepared, recipe = runner.prepared, runner.prepared.recipe
    scratch = f"{FOLDERS['extend']}.work"
    config = _dump(section)
    inputs: dict[str, object] = {"checkpoint": state.identity}
    if section.searches:
        config |= {"seed": recipe.seed, "kernel": recipe.kernel}
        inputs |= {"text": identity(section.searches.text)}

    def work(path: Path) -> Mapping[str, Any]:
        return operations.extend(
            state.path,
            path,
            section,
            state.origin,
            teacher=prepared.teacher,
            kernel=recipe.kernel,
            device=prepared.device,
            seed=recipe.seed,
            work=runner.folder / scratch,
            link=recipe.link,
            overwrite=True,
            progress=runner.progress,
        )

    entry = runner.step("extend", FOLDERS["extend"], config, inputs, work, scratch=(scratch,))
    runner.drop(scratch)
    return runner.made(entry, state.origin.after("extend", _dump(section), entry.result))


def recover(runner: Runner, state: State, section: Recover) -> State:
    """Quality won back by a short training; it goes on from its last own checkpoint after a kill."""
    prepared, recipe = runner.prepared, runner.prepared.recipe
    scratch = f"{FOLDERS['recover']}.work"
    config = {**_dump(section), **_common(recipe), "kernel": recipe.kernel}
    teacher = dict(prepared.source.digests)
    inputs = {"checkpoint": state.identity, "teacher": teacher, "text": identity(section.text)}

    def work(path: Path) -> Mapping[str, Any]:
        report = operations.recover(
            state.path,
            prepared.source.folder,
            path,
            section,
            state.origin,
            samples=prepared.teacher,
            kernel=recipe.kernel,
            device=prepared.device,
            seed=recipe.seed,
            max_shard_size=shard_size(recipe),
            work=runner.folder / scratch / fingerprint("recover", VERSIONS["recover"], config, inputs)[:16],
            overwrite=True,
            progress=runner.progress,
        )
        return operations.facts(report)

    entry = runner.step("recover", FOLDERS["recover"], config, inputs, work, scratch=(scratch,))
    runner.drop(scratch)
    return runner.made(entry, state.origin.after("recover", _dump(section), entry.result))


def shard_size(recipe: Recipe) -> str:
    """The largest weight file that the steps write: that of the published folder, so it can be linked there."""
    return recipe.publish.max_shard_size if recipe.publish else "5GB"


def _common(recipe: Recipe) -> dict[str, Any]:
    return {"dtype": recipe.dtype, "seed": recipe.seed, "max_shard_size": shard_size(recipe)}


def _dump(section: Convert | Context | Recover) -> dict[str, Any]:
    return operations.dump(section)
