"""YAML to a validated recipe. Every problem is reported at once, each with its line and the key that was meant.

Each value keeps its line; `--set a.b=c` is laid over the values before they are validated; errors of pydantic are then
told in the words of the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from retrofit import bundled, yamlfile
from retrofit.errors import UserError
from retrofit.escape import shown, visible
from retrofit.files import read_text
from retrofit.recipe.schema import Recipe
from retrofit.recipe.suite import Suite
from retrofit.yamlfile import Key

Model = TypeVar("Model", bound=BaseModel)

MAX_TOLD = 20
"""Problems that one message lists; the others are counted."""
_INDEX = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe. where: file:line, or the option that set the value."""

    where: str
    key: str
    what: str

    def __str__(self) -> str:
        parts = (shown(self.where), shown(self.key, 120), shown(self.what, 600))
        return ": ".join(part for part in parts if part)


class RecipeError(UserError):
    """All problems of one recipe."""

    def __init__(self, name: str, problems: Sequence[Problem], fix: str | None = None) -> None:
        number = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
        lines = "".join(f"\n  {problem}" for problem in problems[:MAX_TOLD])
        others = f"\n  and {len(problems) - MAX_TOLD:,} more" if len(problems) > MAX_TOLD else ""
        super().__init__(
            f"{number} in `{shown(name)}`{lines}{others}",
            fix=fix or "correct the lines above; `retrofit schema` lists every key",
        )
        self.problems = tuple(problems)


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
    """Read a recipe file or a bundled recipe, lay `overrides` ("a.b=c") and `model` over it, and validate it.

    Raises RecipeError (a UserError) that lists every problem.
    """
    path = bundled.find("recipes", name_or_path)
    return parse(_text(path), str(path), Recipe, overrides, {"model": model} if model else {})


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
        found = [_problem(document, kind, details) for details in _told_once(error)]
        document.problems += [problem for problem in found if problem.key not in unread]
        raise RecipeError(filename, _in_order(document.problems)) from None
    if document.problems:
        raise RecipeError(filename, _in_order(document.problems))
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
        problems: dict[str | Key, Problem] = {}  # an option that sets two keys is told once
        for details in _told_once(error):
            problem = _problem(document, kind, details)
            option = option_of(tuple(details["loc"])) if option_of else None
            told = problem if option is None else Problem(option, "", problem.what)
            problems.setdefault(option or tuple(details["loc"]), told)
        fix = "correct the options above; --help lists them" if option_of else None
        raise RecipeError(where, list(problems.values()), fix) from None


def _read(text: str, filename: str) -> _Document:
    parsed = yamlfile.parse(text)
    document = _Document(filename)
    document.problems = [
        Problem(f"{filename}:{problem.line}", _dotted(problem.key), problem.what) for problem in parsed.problems
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
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts) or visible(dotted) != dotted:
        document.problems.append(Problem(option, "", "write --set a.b=value"))
        return
    if len(parts) > yamlfile.MAX_DEPTH:
        document.problems.append(Problem(option, dotted, f"no key has {len(parts):,} parts"))
        return
    greater = text.lstrip().startswith(">") and "\n" not in text  # what opens a block in YAML, where lines follow
    parsed = yamlfile.Parsed(text.strip()) if greater else yamlfile.parse(text)
    if parsed.problems:
        document.problems += [Problem(option, dotted, problem.what) for problem in parsed.problems]
        return
    value = parsed.value
    target: Any = document.values
    key: Key = ()
    for index, part in enumerate(parts):
        step: str | int = part
        if isinstance(target, list):
            if not _INDEX.fullmatch(part) or int(part) >= len(target):
                what = f"`{_dotted(key)}` is a list of {len(target)}; `{_short(part)}` is no index of it"
                document.problems.append(Problem(option, dotted, what))
                return
            step = int(part)
        elif not isinstance(target, dict):
            document.problems.append(Problem(option, dotted, f"`{_dotted(key)}` is a single value, not a section"))
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


def _told_once(error: ValidationError) -> list[ErrorDetails]:
    """The errors of pydantic without those that say of a list that it is short, because some of it is wrong."""
    return [
        details
        for details in error.errors(include_url=False)
        if details["type"] != "too_short" or len(details["input"]) < details["ctx"]["min_length"]
    ]


def _problem(document: _Document, kind: type[BaseModel], details: ErrorDetails) -> Problem:
    key: Key = tuple(details["loc"])
    if details["type"] == "extra_forbidden":
        return Problem(document.place(key), _dotted(key), f"unknown key{_meant(kind, key)}")
    return Problem(document.place(key), _dotted(key), _told(details))


def _told(details: ErrorDetails) -> str:
    """An error of pydantic in the words of the file."""
    context = details.get("ctx", {})
    got = details.get("input")
    kind = details["type"]
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        options = [option.strip("'") for option in str(context["expected"]).replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(got), options, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"must be one of {', '.join(options)}, not `{_short(got)}`{hint}"
    for start, words in _WORDS:
        if kind.startswith(start):
            return f"must be {words.format(**context)}, not `{_short(got)}`"
    return f"{details['msg']}, not `{_short(got)}`"


_WORDS = (
    ("int_", "a whole number"),
    ("float_", "a number"),
    ("finite_number", "a finite number"),
    ("bool_", "true or false"),
    ("string_type", "text (quote it)"),
    ("string_pattern", "text matching {pattern}"),
    ("string_too_short", "text of at least {min_length} character"),
    ("string_too_long", "text of at most {max_length} characters"),
    ("too_short", "a list of at least {min_length}"),
    ("too_long", "a list of at most {max_length}"),
    ("tuple_type", "a list"),
    ("dict_type", "a section (key: value)"),
    ("model_", "a section (key: value)"),
    ("greater_than_equal", "at least {ge}"),
    ("greater_than", "greater than {gt}"),
    ("less_than_equal", "at most {le}"),
    ("less_than", "less than {lt}"),
)


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _meant(root: type[BaseModel], key: Key) -> str:
    """ "; did you mean `x`?": a key of the same section, else the same or a near key of another one."""
    wrong = str(key[-1])
    here = section_at(root, key[:-1])
    near = difflib.get_close_matches(wrong, here.model_fields if here else (), n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    elsewhere = dict(_all_keys(root))
    near = difflib.get_close_matches(wrong, elsewhere.values(), n=1, cutoff=0.75)
    paths = [path for path, name in elsewhere.items() if near and name == near[0]]
    if paths:
        return f"; did you mean `{paths[0]}`?"
    return f"; known here: {', '.join(here.model_fields)}" if here else ""


def section_at(root: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """The model that validates the section at `key`."""
    section: type[BaseModel] | None = root
    for part in key:
        if isinstance(part, int):
            continue
        info = section.model_fields.get(part) if section else None
        section = next(_models(info.annotation), None) if info else None
    return section


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside an annotation such as `tuple[TextSource, ...]` or `Convert | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _all_keys(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, last name) of every key, sections' own keys first."""
    for name in root.model_fields:
        yield prefix + name, name
    for name, info in root.model_fields.items():
        for section in _models(info.annotation):
            yield from _all_keys(section, f"{prefix}{name}.")


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _in_order(problems: list[Problem]) -> list[Problem]:
    """By line; those of options last, in the order given."""

    def line(problem: Problem) -> tuple[int, int]:
        _, _, number = problem.where.rpartition(":")
        return (0, int(number)) if _INDEX.fullmatch(number) and not problem.where.startswith("--") else (1, 0)

    return sorted(problems, key=line)
