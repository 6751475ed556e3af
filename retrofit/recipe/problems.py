"""What is wrong with a recipe, in the words of its file: each problem with its place and the key that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.yamlfile import Key

MOST_LISTED = 20
"""Problems that one message lists; the others are counted."""
_LINE = re.compile(r"[0-9]{1,9}")


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
        lines = "".join(f"\n  {problem}" for problem in problems[:MOST_LISTED])
        others = f"\n  and {len(problems) - MOST_LISTED:,} more" if len(problems) > MOST_LISTED else ""
        super().__init__(
            f"{number} in `{shown(name)}`{lines}{others}",
            fix=fix or "correct the lines above; `retrofit schema` lists every key",
        )
        self.problems = tuple(problems)


def described(details: ErrorDetails) -> str:
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
        return f"must be one of {', '.join(options)}, not `{shortened(got)}`{hint}"
    if kind == "tuple_type" and isinstance(got, str | int | float):
        return f"must be a list, such as [{shortened(got)}], not `{shortened(got)}`"
    for start, words in _WORDS:
        if kind.startswith(start):
            return f"must be {words.format(**context)}, not `{shortened(got)}`"
    return f"{details['msg']}, not `{shortened(got)}`"


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


def shortened(value: object, most: int = 60) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def meant(root: type[BaseModel], key: Key) -> str:
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


def dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def in_order(problems: list[Problem]) -> list[Problem]:
    """By line; those of options last, in the order given."""

    def line(problem: Problem) -> tuple[int, int]:
        _, _, number = problem.where.rpartition(":")
        return (0, int(number)) if _LINE.fullmatch(number) and not problem.where.startswith("--") else (1, 0)

    return sorted(problems, key=line)
