"""Errors made for people: what is wrong, where, and how to fix it.

Everything a user can cause is a `UserError`; the command line prints it in up to three lines and exits with code 2.
Broken invariants of our own are assertions and keep their traceback.
"""

from __future__ import annotations

import re
from typing import Any

from retrofit.escape import visible

_OWN_BREAK = re.compile(r"\n(?=  |\Z)")


class UserError(Exception):
    """Something the user can correct.

    what: one sentence, or more lines that are indented. The text shows control characters of foreign words in it as
    escapes. where: a file:line, a folder, a tensor, a layer. fix: the exact next thing to do or type.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        # A line break of our own is followed by an indented line; another one is part of a name.
        return "\n".join("\n".join(map(visible, _OWN_BREAK.split(line))) for line in lines)


def _restored(kind: type[UserError], args: tuple[Any, ...], values: dict[str, Any]) -> UserError:
    """The error that another process has pickled, whatever its class is made of."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(values)
    return error


class PeerError(UserError):
    """Another process of the same command has ended before this one was done."""


class GateError(UserError):
    """A measured result does not meet what the recipe requires; nothing is published.

    result: what the run has measured and written, where it is the end of one.
    """

    result: Any = None
