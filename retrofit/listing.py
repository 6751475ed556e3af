"""What functions were given: their recipe, and of those that list something the options as they stand in a command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.files import output_path
from retrofit.recipe.load import load_recipe
from retrofit.recipe.schema import Recipe


def given_recipe(
    recipe: str | Path | Recipe, overrides: Sequence[str], model: str | Path | None, *, no_cost: bool = False
) -> Recipe:
    """The recipe that a function was given, of another model where one is named. no_cost: without what running costs.

    Raises UserError where it cannot be read.
    """
    named = None if model is None else str(model)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides, named)
    elif overrides:
        raise UserError("overrides apply to a recipe file", where="overrides", fix="change the Recipe itself")
    elif named:
        recipe = recipe.model_copy(update={"model": named})
    if no_cost and recipe.evaluate:
        without = recipe.evaluate.model_copy(update={"cost_lengths": ()})
        recipe = recipe.model_copy(update={"evaluate": without})
    return recipe


@dataclass(frozen=True)
class Listed:
    """What the lists have in common. folder: where what was measured is kept. place: what has to be there and in order.
    model, options: the model with its revision, and the text that is read, as they stand in a command."""

    folder: Path | None
    place: Any
    model: str
    options: str


def listed_with(read: Recipe, given: Mapping[str, Any]) -> Listed:
    """Those of one list. read: the recipe of a list. given: the arguments of its function.

    Raises UserError for values of a recipe where none is named.
    """
    moments, revision, overrides = given["moments"], given["revision"], given["overrides"]
    if overrides and given["recipe"] is None:
        raise UserError(
            "--set changes a value of a recipe, and a model is named alone",
            where=f"--set {shown(overrides[0], 60)}",
            fix="name a recipe and --model MODEL, or use the command's own options",
        )
    folder = None if moments is None else output_path(moments, where="--moments")
    place = {"model": read.model, "revision": revision, "writes": (folder,), "recipe": read}
    options = "".join(f" --calibrate {shell_word(source)}" for source in given["calibrate"] or ())
    return Listed(folder, place, shell_word(read.model) + _pinned(revision), options)


def _pinned(revision: str | None) -> str:
    return "" if revision is None else f" --revision {shell_word(revision)}"


def of_recipe(
    recipe: str | Path | Recipe | None, overrides: Sequence[str], model: str | Path | None, *sections: str
) -> dict[str, Any]:
    """What a list takes from a recipe: the model, how it is computed with, and what these sections set."""
    if recipe is None:
        return {}
    loaded = given_recipe(recipe, overrides, model)
    base: dict[str, Any] = {name: getattr(loaded, name) for name in ("model", "revision", "dtype", "device", "seed")}
    own = {name: getattr(loaded, name) for name in sections}
    return base | {name: part.model_dump(mode="json", exclude_unset=True) for name, part in own.items() if part}


def command_for_heads(
    model: str | Path | None,
    recipe: str | Path | Recipe | None,
    name: str,
    listed: Listed,
    calibrate: Sequence[str],
    overrides: Sequence[str],
) -> str:
    """What to type to get `{kv_heads}` KV heads, chosen from a price list."""
    if recipe is None:
        return f"retrofit convert {listed.model} --kv-heads {{kv_heads}}{listed.options} --out out/kv{{kv_heads}}"
    named = "" if model is None else f" --model {shell_word(model)}"
    values = [*overrides, *([f"convert.calibration.text={json.dumps(list(calibrate))}"] if calibrate else [])]
    options = "".join(f" --set {shell_word(value)}" for value in values)
    recipe_word = name if isinstance(recipe, Recipe) else shell_word(recipe)
    pinned = _pinned(listed.place["revision"])
    return f"retrofit run {recipe_word}{named}{pinned}{options} --set convert.kv_heads={{kv_heads}}"
