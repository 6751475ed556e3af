"""`retrofit` in a process of torchrun, where one rank fails: failing_rank.py HOW RANK COMMAND...

How: `text` (it sees another text), `memory` (it has none left), `bug`, `early` (its recipe is wrong), `killed`
(SIGKILL as it compares what it sees), `killed-later` (SIGKILL as it scores the second model).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from retrofit.cli.main import main
from retrofit.errors import UserError


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def prepare(how: str) -> None:
    from retrofit import listing
    from retrofit.data import identity
    from retrofit.evaluation import folders
    from retrofit.workflow import opening_in_world

    def no_memory(*_: object) -> NoReturn:
        raise MemoryError

    def bug(*_: object) -> NoReturn:
        raise ValueError("a bug")

    def wrong(*_: object) -> NoReturn:
        raise UserError("this recipe is wrong")

    def later(*values: object, **named: object) -> object:
        return die() if named["label"] == "converted" else score(*values, **named)

    score = folders.score_folder
    if how == "text":
        identity.identity = lambda sources: ["another one"]
    elif how == "memory":
        opening_in_world.folder_digest = no_memory
    elif how == "bug":
        opening_in_world.folder_digest = bug
    elif how == "early":
        listing.load_recipe = wrong
    elif how == "killed":
        opening_in_world.folder_digest = die
    elif how == "killed-later":
        folders.score_folder = later
    else:
        raise AssertionError(how)


if __name__ == "__main__":
    how, rank = sys.argv.pop(1), sys.argv.pop(1)
    if os.environ["RANK"] == rank:
        prepare(how)
    main()
