"""The public functions that take a recipe: run it, plan it, and the price list of its conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit import bundled
from retrofit.console import Progress
from retrofit.entry import begun, display, require_run_folder
from retrofit.errors import UserError
from retrofit.files import local_path, output_path
from retrofit.listing import command_for_heads, given_recipe, listed_with, of_recipe
from retrofit.recipe.options import recipe_of
from retrofit.recipe.schema import Device, Recipe
from retrofit.system.world import from_environment
from retrofit.views.notebook import as_tables
from retrofit.workflow.journal import begun_rows, is_run
from retrofit.workflow.rows import with_rows

if TYPE_CHECKING:
    from retrofit.budget.rows import BudgetList
    from retrofit.kv_heads.sweep.price_list import PriceList
    from retrofit.windows.price_list import WindowList
    from retrofit.workflow.estimate.cost import Throughput
    from retrofit.workflow.plan import Plan
    from retrofit.workflow.run import RunResult


@as_tables
def run(
    recipe: str | Path | Recipe,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    from_step: str | None = None,
    no_cost: bool = False,
    dry_run: bool = False,
    progress: Progress | bool = True,
) -> RunResult | Plan:
    """Run a recipe (a bundled name, a .yaml file, or a `Recipe`) in the folder `out` (default `runs/<name>`).

    The folder of a run stands for its recipe, and the run resumes there. The same call resumes after an interruption.
    from_step: do this step and all after it again. no_cost: leave out the measurements of speed and memory. dry_run:
    check everything that is on this machine and return the plan. Raises UserError for bad input, GateError when a
    requirement of the recipe is not met.
    """
    loaded, shown = given_recipe(recipe, overrides, model, no_cost=no_cost), display(progress)
    folder = output_path(_usual_folder(recipe, loaded) if out is None else out, where="--out")
    require_run_folder(folder)
    loaded, about_rows = with_rows(loaded, from_environment().size, begun_rows(folder))
    usual: Any = {"model": loaded.model, "revision": revision, "writes": (folder,), "recipe": loaded}
    with begun(f"run {loaded.name} in {folder}", shown, **usual) as world:
        from retrofit.workflow import run as runs
        from retrofit.workflow.budgeted import UNDECIDED, with_budget
        from retrofit.workflow.estimate.machines import this_machine
        from retrofit.workflow.opening_in_world import open_in

        about: tuple[str, ...] = ()
        if loaded.budget and not dry_run:
            loaded, about = with_budget(loaded, folder, revision=revision, world=world, progress=shown)
        elif loaded.budget and shown:
            shown.note(UNDECIDED)
        runs.check_from_step(from_step, loaded)
        speed = _measured(loaded, world.size) if world.main else None
        context = open_in(world, loaded, revision=revision, out=folder, dry=dry_run, throughput=speed, progress=shown)
        about_rows = (*about, *about_rows)
        context.notes += about_rows
        if not dry_run:
            context.note(*about_rows)
            return runs.run(context, folder, from_step=from_step)
        for note in context.notes if shown else ():
            shown.note(note)  # type: ignore[union-attr]
        return replace(context.plan, machine=this_machine(context.device, folder))


@as_tables
def plan(
    recipe: str | Path | Recipe,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    overrides: Sequence[str] = (),
    no_cost: bool = False,
    measure: bool = True,
    gpu: str | None = None,
    gpus: int | None = None,
    progress: Progress | bool = True,
) -> Plan:
    """What each step of a recipe would do, its memory, disk and time. Reads the model's configuration, no weights.
    Raises UserError when a step is not possible on this model.

    no_cost: without the measurements of speed and memory.
    measure: time a small matrix product for the estimate; otherwise a throughput is assumed, and the plan says so.
    gpu: plan for this GPU (h100, h200, a100, l40s, 4090) instead of this machine; gpus: how many of them a run is
    started on, one process each.
    """
    if gpus is not None and gpu is None:
        raise UserError("there is no GPU to have several of", where="--gpus", fix="add --gpu NAME")
    loaded, shown = given_recipe(recipe, overrides, model, no_cost=no_cost), display(progress)
    processes = gpus or from_environment().size
    loaded, _ = with_rows(loaded, processes)
    with begun(f"plan {loaded.name}", shown, model=loaded.model, revision=revision):
        from retrofit.workflow.budgeted import UNDECIDED
        from retrofit.workflow.estimate.cost import ASSUMED
        from retrofit.workflow.estimate.machines import planned_for, this_machine
        from retrofit.workflow.opening import check_model, open_model, sized

        if loaded.budget and shown:
            shown.note(UNDECIDED)
        context = open_model(loaded, revision=revision, progress=shown)
        context.processes = processes
        check_model(context)
        if gpu is not None:
            machine, context.throughput = planned_for(gpu, 1 if gpus is None else gpus)
            context.recipe = sized(context.recipe, loaded, context.spec, "cuda", memory=machine.memory)
        else:
            machine = this_machine(context.device, Path.cwd())
            context.throughput = _measured(loaded) if measure else ASSUMED
        return replace(context.plan, machine=machine)


@as_tables
def prices(
    model: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    budget: str | None = None,
    calibrate: Sequence[str] | None = None,
    tokens: int | str | None = None,
    moments: str | Path | None = None,
    revision: str | None = None,
    overrides: Sequence[str] = (),
    device: Device | None = None,
    measure: bool = True,
    progress: Progress | bool = True,
) -> PriceList:
    """The price list of `model` (`retrofit plan --kv-heads`): for every possible number of KV heads, its KV cache and
    what it costs in quality, before any recovery.

    recipe: take model, calibration text, repair, seed and dtype from it. budget: bytes at a length (`2GiB@32k`), which
    picks the most KV heads that fit. tokens: of the calibration text. moments: a folder that keeps what was measured;
    the same call then needs no pass over text. measure: time a small matrix product for the estimate. A call that was
    killed is resumed by the same call.
    Raises UserError for bad input, before any long work.
    """
    from retrofit.recipe.kv_budget import parse_budget

    given, shown = locals(), display(progress)
    limit = None if budget is None else parse_budget(budget)
    base: dict[str, Any] = {"convert": {"kv_heads": 1}}
    if recipe is not None:
        base = given_recipe(recipe, overrides, model).model_dump(mode="json")
        base["convert"] = base["convert"] or ({"kv_heads": 1} if calibrate else None)
    loaded = recipe_of("prices", {**given, "model": model if recipe is None else None}, base)
    read = recipe_of("convert", {"kv_heads": 1, "tokens": tokens}).convert
    listed = listed_with(loaded, given)
    command = command_for_heads(model, recipe, loaded.name, listed, calibrate or (), overrides)
    words = "prices" if recipe is None else "plan"
    with begun(f"price list of {loaded.model}", shown, options=words, **listed.place) as world:
        from retrofit.workflow.sweep import prices as price

        usual: dict[str, Any] = {"throughput": lambda: _measured(loaded)} if measure else {}
        return price(
            loaded,
            command=command,
            budget=limit,
            tokens=read.calibration.tokens if tokens is not None and read else None,
            moments=listed.folder,
            revision=revision,
            **usual,
            world=world,
            progress=shown,
        )


@as_tables
def window_prices(
    model: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    size: int | str | None = None,
    calibrate: Sequence[str] | None = None,
    tokens: int | str | None = None,
    moments: str | Path | None = None,
    revision: str | None = None,
    overrides: Sequence[str] = (),
    device: Device | None = None,
    progress: Progress | bool = True,
) -> WindowList:
    """What sliding windows would save and cost `model` (`retrofit plan --windows`): which layers need to see
    everything, KV bytes at several lengths, and the loss of text and of passages out of sight.

    recipe: take model, section `window`, seed and dtype from it. size: of the windows that are measured; others are
    predicted. tokens: of the calibration text. moments: a folder that keeps what was measured; the same call then reads
    no text. A call that was killed is resumed by the same call.
    """
    given, shown = locals(), display(progress)
    base = {"window": {}, **of_recipe(recipe, overrides, model, "window")}
    read = recipe_of("window", {**given, "model": model if recipe is None else None}, base)
    listed, size_of = listed_with(read, given), read.window.size if read.window else 0
    layers = f"--size {size_of} --full-layers {{layers}}{listed.options}"
    command = f"retrofit window {listed.model} {layers} --out out/windows"
    words = "window_prices" if recipe is None else "plan"
    with begun(f"windows of {read.model}", shown, options=words, **listed.place) as world:
        from retrofit.workflow.window_list import window_list

        usual: Any = {"moments": listed.folder, "revision": revision, "world": world, "progress": shown}
        return window_list(read, command=command, **usual)


@as_tables
def budget_prices(
    model: str | Path | None = None,
    *,
    budget: str,
    recipe: str | Path | Recipe | None = None,
    size: int | str | None = None,
    calibrate: Sequence[str] | None = None,
    tokens: int | str | None = None,
    no_pilots: bool = False,
    moments: str | Path | None = None,
    revision: str | None = None,
    overrides: Sequence[str] = (),
    device: Device | None = None,
    progress: Progress | bool = True,
) -> BudgetList:
    """What meets a budget for the KV cache of one sequence (`retrofit plan --kv-budget`, `2GiB@128k`): numbers of KV
    heads, sliding windows and an engine's cache types side by side, with the loss of text and of passages out of sight.

    recipe: take model, sections `convert` and `window`, seed and dtype from it. size: of the windows that are measured.
    calibrate, tokens: of the calibration text. no_pilots: the three best rows are not converted and measured, and none
    is recommended. moments: a folder that keeps what was measured. A call that was killed is resumed by the same call.
    """
    from retrofit.recipe.kv_budget import parse_budget

    limit, given, shown = parse_budget(budget), locals(), display(progress)
    base: dict[str, Any] = {"convert": {"kv_heads": 1}, "window": {}}
    base |= of_recipe(recipe, overrides, model, "convert", "window")
    for section in ("convert", "window"):
        if calibrate:
            base[section] = {**base[section], "calibration": {**base[section].get("calibration", {})}}
            base[section]["calibration"]["text"] = list(calibrate)
    read = recipe_of("budget_prices", {**given, "model": model if recipe is None else None}, base)
    counted = recipe_of("convert", {"kv_heads": 1, "tokens": tokens}).convert
    listed = listed_with(read, given)
    words = "budget_prices" if recipe is None else "plan"
    with begun(f"{budget} for {read.model}", shown, options=words, **listed.place) as world:
        from retrofit.workflow.budgeting import budget_list

        return budget_list(
            read,
            limit,
            name=listed.model,
            options=listed.options,
            measure=not no_pilots,
            tokens=counted.calibration.tokens if tokens is not None and counted else None,
            moments=listed.folder,
            revision=revision,
            world=world,
            progress=shown,
        )


def _usual_folder(recipe: str | Path | Recipe, loaded: Recipe) -> Path:
    """Where a recipe is run: in the folder of the run that was given as the recipe, else in one with its name."""
    if not isinstance(recipe, Recipe):
        folder = bundled.find("recipes", recipe).parent
        if folder == local_path(recipe) and is_run(folder):
            return folder
    return Path("runs") / loaded.name


def _measured(recipe: Recipe, processes: int = 1) -> Throughput:
    """Of this machine. processes: that share a run, each with a GPU of its own; on a CPU they share its cores."""
    from retrofit.model.load import resolve_device
    from retrofit.system.device import is_gpu
    from retrofit.workflow.estimate.throughput import measure

    device = resolve_device(recipe.device)
    found = measure(device)
    return replace(found, gpus=processes) if is_gpu(device) else found
