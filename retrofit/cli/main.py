"""The `retrofit` program: what stands around a command, whichever it is."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys

import typer

from retrofit.cli import streams
from retrofit.cli.app import app
from retrofit.cli.group import Record, show_exception
from retrofit.errors import UserError
from retrofit.system.world import from_environment

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""For the processes of a launcher but rank 0, which alone asks the hub: what it brings is in the cache."""


def main() -> None:
    """Entry point of the `retrofit` command."""
    streams.repair()
    try:
        if not from_environment().main:
            streams.silence()
            os.environ.update(OFFLINE)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else it warns of processes of a launcher that have ended
    if os.environ.get("HOME") == "":  # nobody's home: libraries would take the root folder for it
        del os.environ["HOME"]
    # Else Python goes through every object of torch and transformers once more before it ends, for a second.
    atexit.register(gc.freeze)
    logging.setLogRecordFactory(Record)
    logging.raiseExceptions = False  # a library's line about a foreign value that cannot be written is no traceback
    sys.excepthook = show_exception
    try:
        typer.main.get_command(app)()
    except SystemExit as stop:
        raise SystemExit(stop.code or streams.finish()) from None
