"""The group of all commands: errors in the words of people, and exit codes; foreign words are never obeyed."""

from __future__ import annotations

import logging
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from retrofit.cli import streams
from retrofit.errors import UserError
from retrofit.escape import visible
from retrofit.surroundings import Stopped, require_usable, stopping
from retrofit.system.failure import first_to_fail, tell_launcher
from retrofit.system.world import from_environment

# click's ClickException, which typer has as a copy of its own or not, depending on its version.
_PARSER_ERROR: Any = typer.BadParameter.__mro__[2]
_GOES_ON = "Type the same command again: it resumes where it was."


class Commands(TyperGroup):
    """Commands in the order they are written; errors of people in at most three lines, exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _plain_words():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        try:
            require_usable()
            with stopping(), _plain_words():
                return super().invoke(ctx)
        except UserError as error:
            _stop(str(error), error.exit_code)
        except Stopped as stopped:
            more = " Perhaps because another process has ended." if from_environment().size > 1 else ""
            _stop(f"\nstopped ({stopped}).{more} {_GOES_ON}", stopped.exit_code)
        except KeyboardInterrupt:
            _stop(f"\nstopped. {_GOES_ON}", 130)
        except (OSError, MemoryError) as error:
            from retrofit.checkpoint.full import machine_error

            found = machine_error(error)
            if found is None:
                raise
            _stop(str(found), found.exit_code)


def _stop(message: str, code: int) -> None:
    """End with a message; of several processes the first one that fails has it."""
    world = from_environment()
    if first_to_fail(world):
        stream = sys.stderr if world.main else streams.failing()
        rank = "" if world.main else f"\n  rank:  {world.rank} of {world.size}, on {socket.gethostname()}"
        stream.write(visible(message + rank, keep="\n") + "\n")
        stream.flush()
        tell_launcher(visible(message + rank, keep="\n"))
    raise typer.Exit(code)


@contextmanager
def _plain_words() -> Iterator[None]:
    """What the command line's parser says about an argument shows its control characters as escapes."""
    try:
        yield
    except _PARSER_ERROR as error:
        error.message = visible(error.message, keep="\n")
        raise


class Record(logging.LogRecord):
    """A line of a library's log, in which names of files and values of configurations are foreign."""

    def getMessage(self) -> str:
        return visible(super().getMessage(), keep="\n\t")


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show the traceback of an error of our own; of several processes the first one that fails has it."""
    world = from_environment()
    if not first_to_fail(world):
        return
    stream = sys.stderr if world.main else streams.failing()
    stream.write(visible("".join(traceback.format_exception(kind, error, trace)), keep="\n\t"))
