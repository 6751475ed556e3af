"""Which layers of a model are meant: `auto`, so many, a share of them, or a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from retrofit.escape import shown
from retrofit.recipe.values import Written

MOST = 65_535
Layer = Annotated[int, Field(ge=0, le=MOST)]
"""A layer, or how many."""
_SHARE = re.compile(r"\s*([1-9][0-9]{0,5}/[1-9][0-9]{0,5})\s*")
_LIST = re.compile(r"\s*[0-9]{1,6}(\s*,\s*[0-9]{1,6})*\s*,?\s*")


def layers_named(value: object) -> object:
    """8 of "8", (7, 17) of "7,17" and of [17, 7], (8,) of "8,"; "auto", and "1/4" of all. ValueError for anything
    else."""
    if isinstance(value, str):
        if value.strip() == "auto":
            return "auto"
        share = _SHARE.fullmatch(value)
        if share and Fraction(share[1]) < 1:
            return share[1]
        if _LIST.fullmatch(value):
            numbers = [int(part) for part in value.split(",") if part.strip()]
            value = numbers if "," in value else numbers[0]
    if isinstance(value, list | tuple):
        if all(map(_is_layer, value)):
            return tuple(sorted(set(value)))
    elif _is_layer(value):
        return value
    text = shown(value if isinstance(value, str) else repr(value), 60)
    raise ValueError(f"must be auto, a number of layers, a share such as 1/4, or a list of layers, not `{text}`")


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def how_many(value: int | str | Sequence[int], layers: int) -> int | None:
    """How many of `layers` layers are meant; None for `auto`."""
    if value == "auto":
        return None
    if isinstance(value, str):
        return max(1, round(layers * Fraction(value)))
    return value if isinstance(value, int) else len(value)


FULL_LAYERS = Written(
    layers_named,
    {
        "anyOf": [
            {"type": "string", "pattern": "^(auto|[1-9][0-9]*/[1-9][0-9]*|[0-9]+(,[0-9]+)*,?)$", "examples": ["1/4"]},
            {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MOST}},
        ]
    },
)
"""Annotation of such a value."""
