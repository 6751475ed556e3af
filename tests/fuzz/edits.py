"""Valid structures with some values exchanged for odd ones, chosen by bytes: the same bytes give the same structure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    3.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    10**6,
    10**9,
    2**31,
    2**63,
    10**30,
    "",
    "64",
    "auto",
    "none",
    "../..",
    "/dev/zero",
    "\x1b[31mred",
    "a\nb",
    "```python\nraise SystemExit\n```",
    "{{ x }}",
    "中文",
    "x" * 5000,
    [],
    {},
    [0],
    ["a", 1, None],
    [[[[]]]],
    {"a": 1},
    {"": {}},
    [1] * 2000,
)


class Choices:
    """Decisions read from bytes, one after the other; when they are used up every decision is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        width = 1 if count <= 256 else 4
        taken = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(taken, "little") % count

    def of(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def rest(self) -> bytes:
        """What no decision has used."""
        return self._data[self._at :]


def edited(value: Any, choices: Choices, more: Sequence[str] = (), most: int = 4) -> Any:
    """A copy with up to `most` places exchanged, removed, doubled or renamed. more: keys that may be added anywhere."""
    value = copy.deepcopy(value)
    for _ in range(1 + choices.below(most)):
        value = _once(value, choices, more)
    return value


def _once(value: Any, choices: Choices, more: Sequence[str]) -> Any:
    places = list(_places(value))
    if not places:
        return _odd(choices)
    container, key = choices.of(places)
    how = choices.below(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict) and more:
        container[choices.of(more)] = _odd(choices)
    elif how == 2:
        other, place = choices.of(places)
        container[key] = copy.deepcopy(other[place]) if place in _keys(other) else None
    elif how == 3 and isinstance(container, dict):
        container[f"{key}{choices.of(('', ' ', '_', '2', chr(0)))}"] = container.pop(key)
    elif how == 4 and isinstance(container[key], int) and not isinstance(container[key], bool):
        container[key] += choices.of((1, -1, 2, 1000, -(10**9)))
    else:
        container[key] = _odd(choices)
    return value


def _odd(choices: Choices) -> Any:
    """One of the odd values, of its own: later edits go into it."""
    return copy.deepcopy(choices.of(ODD))


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        for key in list(_keys(value))[:500]:
            found.append((value, key))
            found += _places(value[key])
    return found
