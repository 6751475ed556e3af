"""Dialogues: rows of `messages`, `conversations`, or `prompt` and `completion`, as one form, each turn checked.

The keys of a file's first row say which of them it holds. A row may give `tools` beside its turns (a list of JSON
schemas, or that list as JSON).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrofit.errors import UserError
from retrofit.escape import shown

Turn = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a turn may have."""
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_KEYS = (("messages",), ("conversations",), ("prompt", "completion"))
TOOLS = "tools"


@dataclass(frozen=True)
class Dialogue:
    """The turns of one dialogue, each with `role` and `content` and whatever else the row gives it, and its tools.

    where: file and line of the row.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...]
    where: str

    @property
    def transcript(self) -> str:
        """The words of its turns, without roles and system turns: by these copies are known, whatever their form."""
        return "\n\n".join(
            [str(turn.get("content", "")) for turn in self.turns if turn["role"] not in ("system", "developer")]
        )


def keys_of(row: Mapping[str, object], field: str) -> tuple[str, ...]:
    """The keys that hold a row's dialogue; none where it is text. field: the key of the text, or of the turns."""
    if field in row:
        return (field,) if isinstance(row[field], list | tuple) else ()
    return next((keys for keys in _KEYS if all(key in row for key in keys)), ())


def parse_dialogue(row: Mapping[str, object], keys: Sequence[str], where: str) -> Dialogue:
    """The dialogue of a row under its keys. Raises UserError, with `where`, for a row that holds none."""
    try:
        return _dialogue(row, keys, where)
    except RecursionError:
        raise _bad("the row is nested too deeply", where, "correct the line") from None


def _dialogue(row: Mapping[str, object], keys: Sequence[str], where: str) -> Dialogue:
    missing = [key for key in keys if row.get(key) is None]
    if missing:
        key, names = missing[0], ", ".join(map(str, row))
        raise UserError(
            f"`{shown(key, 40)}` holds nothing (null)"
            if key in row
            else f"no key `{shown(key, 40)}`; there are: {shown(names, 200) or 'none'}",
            where=where,
            fix=f"give every row of the file {' and '.join(f'`{shown(key, 40)}`' for key in keys)}",
        )
    given = [row[key] for key in keys]
    if len(keys) > 1:
        roles = ("user", "assistant")
        given = [[{"role": r, "content": v}] if isinstance(v, str) else v for r, v in zip(roles, given, strict=True)]
    turns: list[Turn] = []
    for key, some in zip(keys, given, strict=True):
        if not isinstance(some, list | tuple):
            raise _bad(f"`{shown(key, 40)}` holds {type(some).__name__}, not a list of turns", where)
        turns += [_turn(turn, len(turns) + number, where) for number, turn in enumerate(some, 1)]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _bad("the dialogue has no turn of the assistant", where, "leave the row out, or add an answer")
    return Dialogue(tuple(turns), _tools(row.get(TOOLS), where), where)


def _turn(given: object, number: int, where: str) -> Turn:
    """One turn, its role by our name for it."""
    if not isinstance(given, Mapping):
        raise _bad(f"turn {number} is {type(given).__name__}, not an object with `role` and `content`", where)
    turn: Turn = _filled(given)
    if "role" not in turn and "from" in turn:
        turn = {**turn, "role": _SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
        turn = _filled({key: value for key, value in turn.items() if key not in ("from", "value")})
    if "role" not in turn:
        raise _bad(f"turn {number} has no role", where)
    role = turn["role"]
    if role not in ROLES:
        raise _bad(f"turn {number} has the role `{shown(role, 40)}`", where, f"use {', '.join(ROLES)}")
    calls = turn.get("tool_calls")
    if calls is not None and not (role == "assistant" and isinstance(calls, list | tuple)):
        raise _bad(f"`tool_calls` of turn {number} is no list of the assistant's calls", where)
    content = turn.get("content", "" if calls else None)
    if content is None:
        raise _bad(f"turn {number} has no content", where)
    if not isinstance(content, str):
        raise _bad(f"the content of turn {number} is {type(content).__name__}, not text", where, "write it as one text")
    if role == "assistant" and not content.strip() and not calls:
        raise _bad(f"turn {number}, the assistant's, is empty", where, "leave the row out, or add an answer")
    _require_whole(turn, number, where)
    return {**turn, "content": content}


def _filled(value: Any) -> Any:
    """Without the keys that a table gives every row, empty where a row has none."""
    if isinstance(value, Mapping):
        return {str(key): _filled(one) for key, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list | tuple) else value


def _tools(value: object, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _bad("`tools` is text that is no JSON", where, "give a list of JSON schemas") from None
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise _bad("`tools` is no list of objects", where, "give a list of JSON schemas")
    return tuple(_filled(one) for one in value)


def _require_whole(turn: Turn, number: int, where: str) -> None:
    try:
        json.dumps(turn, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise _bad(
            f"half a character (a lone surrogate) stands in turn {number}",
            where,
            "write the text again with whole characters",
        ) from None


def _bad(what: str, where: str, fix: str = 'write turns as {"role": "user", "content": "..."}') -> UserError:
    return UserError(what, where=where, fix=fix)
