"""A command's context in every process: rank 0 opens and checks everything, the others see the same folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.data.sources import HUB, OURS
from retrofit.recipe.schema import Recipe
from retrofit.system.agreement import digest_of, folder_digest, require_same
from retrofit.system.world import World
from retrofit.workflow.context import ModelContext
from retrofit.workflow.opening import open_context

if TYPE_CHECKING:
    from retrofit.console import Progress


@dataclass(frozen=True)
class _Opened:
    """What rank 0 has opened, for the others. asks_tasks: whether tasks of the harness are asked."""

    values: dict[str, Any]
    asks_tasks: bool


def open_in(world: World, recipe: Recipe, *, progress: Progress | None = None, **options: Any) -> ModelContext:
    """The context of a recipe in every process of `world`; options: those of `open_context`.

    Rank 0 alone asks the hub, downloads, and reads and chooses text, however long it takes; the others open the same
    folders. Raises UserError, in every process, for what `open_context` refuses and where a process sees another model
    or other text.
    """
    return shared_context(world, lambda: open_context(recipe, processes=world.size, progress=progress, **options))


def shared_context(world: World, open_one: Callable[[], ModelContext]) -> ModelContext:
    """What `open_one` opens in rank 0, which alone calls it, in every process of `world`. Raises UserError as `open_in`
    does."""
    if world.size == 1:
        return open_one()
    mine: list[ModelContext] = []

    def opened() -> _Opened:
        context = open_one()
        mine.append(context)
        shared = ("recipe", "steps", "source", "original_source", "device", "processes", "throughput")
        own = ("allow_extrapolation", "alone", "documents", "shared", "notes")
        values = {name: getattr(context, name) for name in (*shared, *own)}
        return _Opened(values, context.harness is not None)

    found = world.only(opened)
    context = mine[0] if mine else ModelContext(**found.values)
    context.world, context.device = world, world.device(context.device)
    if not mine and found.asks_tasks:
        from retrofit.workflow.questions import harness_of

        context.harness = harness_of(context.recipe, context.model)
    _require_same_inputs(context)
    return context


def _require_same_inputs(context: ModelContext) -> None:
    """UserError unless every process sees the same model folders and texts."""
    from retrofit.data.identity import identity

    folders = {"the model": context.model.path, "the original model": context.original_model.path}
    seen = {f"{name} in {path}": folder_digest(path) for name, path in folders.items()}
    for text in dict.fromkeys(context.texts()):
        if text.source not in OURS and not text.source.startswith(HUB):
            seen[f"the text `{text.source}`"] = digest_of(identity([text]))
    require_same(context.world, seen, fix="put them into folders that all nodes share, under the same paths")
