"""YAML to a validated recipe. Every problem is reported at once, each with its line and the key that was meant.

Each value keeps its line; `--set a.b=c` is laid over the values before they are validated; errors of pydantic are then
reported in the words of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from retrofit import bundled, yamlfile
from retrofit.errors import UserError
from retrofit.escape import shown, visible
from retrofit.files import read_text
from retrofit.recipe.problems import Problem, RecipeError, described, dotted, in_order, meant, shortened
from retrofit.recipe.schema import LONGEST_DESCRIPTION, Recipe
from retrofit.recipe.suite import Suite
from retrofit.yamlfile import Key

Model = TypeVar("Model", bound=BaseModel)

_KEY = re.compile(r"`([a-z_]+)`")
_SURGERY = ("convert", "window", "context", "recover")  # what a recipe's description is about
_INDEX = re.compile(r"[0-9]{1,9}")


@dataclass
class _Document:
    """Values of a file with, for each key, where it was given."""

    filename: str
    values: dict[str, Any] = field(default_factory=dict)
    where: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Where `key` was given; that of the nearest part above it when it was not given at all."""
        while key and key not in self.where:
            key = key[:-1]
        return self.where.get(key, f"{self.filename}:1")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """Read a recipe file or a bundled recipe, lay `overrides` ("a.b=c") and `model` over it, and validate it. The
    description of what it does is followed by the overrides that change it.

    Raises RecipeError (a UserError) that lists every problem.
    """
    path = bundled.find("recipes", name_or_path)
    recipe = parse(_text(path), str(path), Recipe, overrides, {"model": model} if model else {})
    changed = ", ".join(one for one in overrides if one.partition(".")[0].partition("=")[0].strip() in _SURGERY)
    note = f"; changed: {shortened(changed, 300)}"
    if not recipe.description or not changed or recipe.description.endswith(note):
        return recipe
    return recipe.model_copy(
        update={"description": shortened(recipe.description, LONGEST_DESCRIPTION - len(note)) + note}
    )


def load_suite(name_or_path: str | Path) -> Suite:
    """Read an evaluation suite: a file or the name of a bundled one."""
    path = bundled.find("suites", name_or_path)
    return parse(_text(path), str(path), Suite)


def _text(path: Path) -> str:
    try:
        return read_text(path, limit=yamlfile.MAX_BYTES)
    except UserError as error:
        raise RecipeError(str(path), [Problem(error.where or str(path), "", error.what)]) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out. `parse(dump_recipe(r)) == r`."""
    values = recipe.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    if visible(text, keep="\n") == text:
        return text
    # What turns the direction of writing, for example, is written as an escape where it is shown as well.
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=110)


def parse(
    text: str,
    filename: str,
    kind: type[Model],
    overrides: Sequence[str] = (),
    options: dict[str, str] | None = None,
) -> Model:
    """Validate YAML text as `kind`. options: values given by options of their own (`--model`)."""
    document = _read(text, filename)
    for override in overrides:
        _apply(document, override)
    for name, value in (options or {}).items():
        document.values[name] = value
        document.where[(name,)] = f"--{name}"
    try:
        result = kind.model_validate(document.values)
    except ValidationError as error:
        unread = {problem.key for problem in document.problems}
        found = [_problem(document, kind, details) for details in _without_consequences(error)]
        document.problems += [problem for problem in found if problem.key not in unread]
        raise RecipeError(filename, in_order(document.problems)) from None
    if document.problems:
        raise RecipeError(filename, in_order(document.problems))
    return result


def validate(
    values: dict[str, Any], kind: type[Model], where: str, option_of: Callable[[Key], str | None] | None = None
) -> Model:
    """Validate plain values as `kind`. where: what people call their origin, for example "options".

    option_of: the option that sets the value of a key, where one does. Raises RecipeError that lists every problem, in
    the words of the options.
    """
    document = _Document(where, values, {(): where})
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems: dict[str | Key, Problem] = {}  # an option that sets two keys is reported once
        for details in _without_consequences(error):
            problem = _problem(document, kind, details)
            key: Key = tuple(details["loc"])
            option = option_of(key) if option_of else None
            if option is not None:
                problem = Problem(option, "", problem.what)
            elif option_of and details["type"] == "value_error":  # of a section, whose keys it names
                what = _with_flags(problem.what, key, option_of)
                problem = problem if what == problem.what else Problem("", "", what)
            problems.setdefault(option or key, problem)
        fix = "correct the options above; --help lists them" if option_of else None
        raise RecipeError(where, list(problems.values()), fix) from None


def _with_flags(what: str, section: Key, option_of: Callable[[Key], str | None]) -> str:
    """A problem of a section that names keys of it as `key`, with the options that set these."""
    return _KEY.sub(lambda match: option_of((*section, match[1])) or match[0], what)


def _read(text: str, filename: str) -> _Document:
    parsed = yamlfile.parse(text)
    document = _Document(filename)
    document.problems = [
        Problem(f"{filename}:{problem.line}", dotted(problem.key), problem.what) for problem in parsed.problems
    ]
    if parsed.value is None and document.problems:
        raise RecipeError(filename, document.problems)
    if parsed.value is not None and not isinstance(parsed.value, dict):
        raise RecipeError(filename, [Problem(f"{filename}:1", "", "a recipe is a mapping (key: value)")])
    document.values = parsed.value or {}
    document.where = {key: f"{filename}:{line}" for key, line in parsed.lines.items()}
    return document


def _apply(document: _Document, override: str) -> None:
    """Lay one `a.b=c` over the values; c is read as YAML, and a bound like `>= 2` as it is."""
    option = f"--set {shown(override, 120)}"
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or visible(path) != path:
        document.problems.append(Problem(option, "", "write --set a.b=value"))
        return
    if len(parts) > yamlfile.MAX_DEPTH:
        document.problems.append(Problem(option, path, f"no key has {len(parts):,} parts"))
        return
    greater = text.lstrip().startswith(">") and "\n" not in text  # what opens a block in YAML, where lines follow
    parsed = yamlfile.Parsed(text.strip()) if greater else yamlfile.parse(text)
    if parsed.problems:
        document.problems += [Problem(option, path, problem.what) for problem in parsed.problems]
        return
    value = parsed.value
    target: Any = document.values
    key: Key = ()
    for index, part in enumerate(parts):
        step: str | int = part
        if isinstance(target, list):
            if not _INDEX.fullmatch(part) or int(part) >= len(target):
                what = f"`{dotted(key)}` is a list of {len(target)}; `{shortened(part)}` is no index of it"
                document.problems.append(Problem(option, path, what))
                return
            step = int(part)
        elif not isinstance(target, dict):
            document.problems.append(Problem(option, path, f"`{dotted(key)}` is a single value, not a section"))
            return
        key = (*key, step)
        if index == len(parts) - 1:
            _forget(document, key)
            target[step] = value
            document.where[key] = option
        else:
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
                document.where[key] = option
            target = target[step]


def _forget(document: _Document, key: Key) -> None:
    for known in [known for known in document.where if known[: len(key)] == key]:
        del document.where[known]


def _without_consequences(error: ValidationError) -> list[ErrorDetails]:
    """The errors of pydantic without those that say of a list that it is short, because some of it is wrong."""
    return [
        details
        for details in error.errors(include_url=False)
        if details["type"] != "too_short" or len(details["input"]) < details["ctx"]["min_length"]
    ]


def _problem(document: _Document, kind: type[BaseModel], details: ErrorDetails) -> Problem:
    key: Key = tuple(details["loc"])
    if details["type"] == "extra_forbidden":
        return Problem(document.place(key), dotted(key), f"unknown key{meant(kind, key)}")
    what = described(details)
    if details["type"] == "value_error" and any(
        known[:-1] == key and place.startswith("--set ") for known, place in document.where.items() if known
    ):
        what += f"; --set {dotted((*key, 'KEY'))}=null takes a key out"
    return Problem(document.place(key), dotted(key), what)
