"""Lengths and numbers of KV heads that a recipe gives relative to its model: `native`, `target`, `2x`, `1/2x`, `1/4`.

They stay as written until the model is known; `resolved` then makes numbers of them. Code that runs after it sees
numbers only, which is what the types say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

LENGTH = r"native|target|[0-9]{1,6}(?:/[1-9][0-9]{0,5}|\.[0-9]{1,6})?x"
"""Pattern of a relative length."""
_LENGTH = re.compile(rf"\s*(?:{LENGTH})\s*")
_HEADS = re.compile(r"\s*[1-9][0-9]{0,5}/[1-9][0-9]{0,5}\s*")


class Relative(str):
    """The word for a number that follows from the model."""

    @property
    def share(self) -> Fraction | None:
        """What part of the model's own number, or how many times it; None for `target`."""
        known = {"native": Fraction(1), "target": None}
        return known[self] if self in known else Fraction(self.removesuffix("x"))


def length_word(text: str) -> Relative | None:
    """`native`, `target`, `2x` or `1/2x` (times native); None for anything else."""
    return Relative(text.strip()) if _LENGTH.fullmatch(text) else None


def heads_word(text: str) -> Relative | None:
    """`1/4` of the model's KV heads; None for anything else, and for more than it has."""
    found = Relative(text.strip()) if _HEADS.fullmatch(text) else None
    return found if found and Fraction(found) <= 1 else None


@dataclass(frozen=True)
class MayBeRelative:
    """Annotation of a number that may be written relative to the model. heads: of KV heads, otherwise of positions."""

    heads: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        read = heads_word if self.heads else length_word

        def validate(value: Any, number: Any) -> Any:
            if isinstance(value, Relative):
                return value
            found = read(value) if isinstance(value, str) else None
            return number(value) if found is None else found

        return core_schema.no_info_wrap_validator_function(
            validate,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(_plain, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        pattern = "^[1-9][0-9]*/[1-9][0-9]*$" if self.heads else f"^({LENGTH})$"
        examples = ["1/4"] if self.heads else ["native", "target", "2x", "1/2x"]
        inner = handler(schema)
        either = inner["anyOf"] if set(inner) == {"anyOf"} else [inner]
        return {"anyOf": [*either, {"type": "string", "pattern": pattern, "examples": examples}]}


RELATIVE_LENGTH = MayBeRelative()
RELATIVE_HEADS = MayBeRelative(heads=True)


def _plain(value: Any, info: core_schema.SerializationInfo) -> Any:
    return str(value) if isinstance(value, Relative) and info.mode == "json" else value


def are_relative(*values: object) -> bool:
    """Whether one of the values is not a number yet."""
    return any(isinstance(value, Relative) for value in values)


def ascending(values: Sequence[int]) -> tuple[int, ...]:
    """Without repetition, and in order as soon as they are numbers."""
    return tuple(dict.fromkeys(values)) if are_relative(*values) else tuple(sorted(set(values)))
