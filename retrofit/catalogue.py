"""The bundled recipes: listed, shown, copied; and the recipe language as JSON Schema."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit import bundled
from retrofit.checkpoint.full import writing
from retrofit.checkpoint.staging import put_file
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import output_path
from retrofit.recipe.load import dump_recipe, load_recipe
from retrofit.recipe.schema import Recipe


@dataclass(frozen=True)
class RecipeEntry:
    """A bundled recipe."""

    name: str
    description: str
    path: Path


def recipes() -> tuple[RecipeEntry, ...]:
    """The bundled recipes."""
    paths = [bundled.find("recipes", name) for name in bundled.names("recipes")]
    return tuple(RecipeEntry(path.stem, load_recipe(path).description, path) for path in paths)


def show_recipe(name: str | Path, *, overrides: Sequence[str] = ()) -> str:
    """A recipe as YAML with every default written out."""
    return dump_recipe(load_recipe(name, overrides))


def copy_recipe(name: str | Path, to: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Copy a recipe as it is written, comments included; returns the new file.

    overwrite: the file may exist. Raises UserError where it does otherwise.
    """
    source = bundled.find("recipes", name)
    target = output_path(to if to is not None else f"{source.stem}.yaml", where="FILE")
    if target.is_dir():
        target = target / source.name
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        raise UserError("the file exists already", where=shown(target), fix="give another name, or add --overwrite")
    if not target.parent.is_dir():
        raise UserError("there is no folder to copy into", where=shown(target.parent), fix="make it, or choose another")
    with writing(target):
        put_file(target, source.read_bytes(), overwrite=overwrite)
    return target


def schema() -> dict[str, Any]:
    """The recipe language as JSON Schema."""
    return Recipe.model_json_schema()


def is_recipe(name: str) -> bool:
    """Whether a word names a recipe (a .yaml file, or a bundled one) rather than a model."""
    return Path(name).suffix in (".yaml", ".yml") or (name in bundled.names("recipes") and not Path(name).is_dir())
