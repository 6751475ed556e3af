"""What others may read of a run: models by their hub names, files by their names alone, no path of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrofit.data.sources import HUB
from retrofit.model.source import EMBEDDED, Source
from retrofit.recipe.schema import Recipe


def public_model(source: Source) -> str:
    """The source as others can name it: no path of this machine."""
    if source.repo_id or source.requested == EMBEDDED:
        return source.repo_id or source.requested
    return source.base_model or Path(source.requested).name


def public_recipe(recipe: Recipe, source: Source) -> Recipe:
    """The recipe as others can read it: files by their names alone."""
    values = public_texts(recipe.model_dump(mode="json"))
    tasks = (values["evaluate"] or {}).get("tasks")
    if tasks:
        tasks["names"] = [Path(name).name for name in tasks["names"]]
        tasks["folder"] = tasks["folder"] and Path(tasks["folder"]).name
    return Recipe.model_validate({**values, "model": public_model(source)})


def public_texts(value: Any) -> Any:
    """JSON values in which every text source (what has `source` and `split`) goes by its name: no path of this
    machine."""
    if isinstance(value, Mapping):
        found = {key: public_texts(item) for key, item in value.items()}
        if {"source", "split"} <= found.keys() and not str(found["source"]).startswith(HUB):
            found["source"] = Path(found["source"]).name
        return found
    return [public_texts(item) for item in value] if isinstance(value, list | tuple) else value


def source_record(source: Source) -> Mapping[str, object]:
    """Where a model comes from, as retrofit.json keeps it."""
    return {
        "model": public_model(source),
        "kind": source.kind,
        "revision": source.revision,
        "base_model": source.base_model,
        "license": source.license,
        "dtype": source.dtype,
        **({"notes": list(source.notes)} if source.notes else {}),
        "digests": dict(source.digests),
    }
