"""`retrofit recipes`: the bundled recipes listed, shown and copied."""

from __future__ import annotations

from typing import Annotated

import typer

import retrofit
from retrofit.cli import following
from retrofit.cli.options import Json, Overwrite, Recipe, Set, command, console_for
from retrofit.views import results

recipes_app = typer.Typer(help="List, show and copy the bundled recipes.", no_args_is_help=True, rich_markup_mode=None)


@command(recipes_app, "recipes", "retrofit recipes list", name="list")
def recipes_list(json: Json = False) -> None:
    """The bundled recipes."""
    found = retrofit.recipes()
    console_for(json).show(found, [*results.recipes(found), *following.after_recipe("NAME")])


@command(recipes_app, "recipes", "retrofit recipes show gqa", name="show")
def recipes_show(name: Recipe, set_: Set = None, json: Json = False) -> None:
    """A recipe with every default written out."""
    import yaml

    from retrofit import api

    text = api.show_recipe(name, overrides=set_ or ())
    console_for(json).show(yaml.safe_load(text), [text.rstrip()])


@command(recipes_app, "recipes", "retrofit recipes copy gqa my-gqa.yaml", name="copy")
def recipes_copy(
    name: Recipe,
    to: Annotated[str | None, typer.Argument(metavar="FILE", help="Default NAME.yaml here.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Copy a recipe, comments included, to change it."""
    from retrofit import api

    path = api.copy_recipe(name, to, overwrite=overwrite)
    console_for(json).show({"file": path}, [f"written: {path}", *following.after_recipe(path)])
