"""The program in this process, as it is typed."""

from __future__ import annotations

from typer.testing import CliRunner

from retrofit.cli.app import app


def cli(*arguments: object, code: int = 0) -> str:
    """What a command says, which ends with `code`: on stdout where all is well or in JSON, else altogether."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout if code == 0 or "--json" in arguments else result.output
