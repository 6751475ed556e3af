"""Where recipes, evaluation suites, the pins of engines and the table of what engines compute live: inside an installed
wheel, or at the top level of a checkout."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import local_path, require_regular

Kind = Literal["recipes", "suites", "engines", "results"]
_PACKAGE = Path(__file__).parent
_CHECKOUT: dict[Kind, str] = {
    "recipes": "recipes",
    "suites": "evals/suites",
    "engines": "constraints/engines",
    "results": "evals/results",
}
_SUFFIX: dict[Kind, str] = {"recipes": ".yaml", "suites": ".yaml", "engines": ".txt", "results": ".json"}


def folder(kind: Kind) -> Path:
    """The folder that holds the bundled files of one kind."""
    inside = _PACKAGE / "_bundled" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / _CHECKOUT[kind]


def names(kind: Kind) -> tuple[str, ...]:
    """Names of the bundled files, without suffix, sorted."""
    suffix = _SUFFIX[kind]
    return tuple(sorted(path.name.removesuffix(suffix) for path in folder(kind).glob(f"*{suffix}")))


def find(kind: Kind, name_or_path: str | Path) -> Path:
    """The YAML file meant by a path or a bundled name; a run folder means the recipe it was made with.

    Raises UserError with the nearest name when there is no such file.
    """
    word = kind.removesuffix("s")
    path = local_path(name_or_path, where=word)
    given, escaped = str(name_or_path), shown(name_or_path, 80)
    if path.is_file():
        return path
    if given in names(kind):
        return folder(kind) / f"{given}.yaml"
    if path.is_dir():
        require_regular(
            path / "recipe.yaml",
            missing="the folder holds no recipe.yaml",
            fix=f"name a {word} file or one of {_listed(kind)}{'; a model goes after --model' * (kind == 'recipes')}",
        )
        return path / "recipe.yaml"
    if os.path.lexists(path):
        require_regular(path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"there is no {word} file `{escaped}`", fix=f"name an existing file or one of {_listed(kind)}")
    near = difflib.get_close_matches(given, names(kind), n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise UserError(f"there is no {word} `{escaped}`", fix=f"{hint}bundled: {_listed(kind)}; or give a .yaml file")


def _listed(kind: Kind) -> str:
    return ", ".join(names(kind))
