"""Calls of other libraries on values and files that somebody else made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from retrofit.errors import UserError
from retrofit.escape import shown


@contextmanager
def foreign_values(what: str, where: str, fix: str) -> Iterator[None]:
    """A UserError in the place of whatever another library raises on values or files that somebody else made.

    Only around calls that build one object of transformers or tokenizers from a user's folder. Which exceptions broken
    input gives there is part of no contract: Rust code raises plain Exception, and its panics are BaseException.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {_last_line(error)}", where=where, fix=fix) from error


def _last_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return shown(lines[-1]) if lines else type(cause).__name__
