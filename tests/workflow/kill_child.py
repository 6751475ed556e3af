"""Runs one recipe undisturbed, then again and again, each time killed at another moment, until an attempt ends.

`python -m tests.workflow.kill_child RECIPE CALM HUNTED recover:3 rename:state.json`: the undisturbed run is in CALM. Of
those in HUNTED the first attempt gets SIGKILL at the third sign of life of the task `recover` (everything a run tells
its Progress is one), the next just before a file gets the name `state.json`. An attempt is a fork of this process.
Prints where every attempt died as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from retrofit import api
from tests.killing import settle


class Mortal:
    """A Progress that kills its process at the `lives`-th call of the task `where`, and notes that it did."""

    def __init__(self, where: str, lives: int, note: Path) -> None:
        self.where, self.lives, self.place, self.file = where, lives, "start", note

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._live(task)

    def advance(self, n: int, **fields: float | str) -> None:
        self._live(self.place)

    def finish(self) -> None:
        self._live(self.place)

    def note(self, text: str) -> None:
        self._live(text.split(",")[0])

    def _live(self, place: str) -> None:
        self.place = place
        if place != self.where:
            return
        self.lives -= 1
        if self.lives == 0:
            self.file.write_text(place)
            os.kill(os.getpid(), signal.SIGKILL)


def die_before_name(name: str, note: Path) -> None:
    """Kill this process just before it renames something to `name`, and note that it did."""

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and Path(str(arguments[1])).name == name:
            note.write_text("rename")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def attempt(recipe: str, out: str, limit: str) -> str:
    """Fork, run, and say where the attempt died, or `done`."""
    where, _, at = limit.partition(":")
    note = Path(f"{out}.place")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if where == "rename":
                die_before_name(at, note)
            api.run(recipe, out=out, progress=Mortal(where, int(at) if at.isdigit() else 0, note))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        place = note.read_text()
        note.unlink()
        return place
    assert os.WEXITSTATUS(status) == 0, "an attempt failed by itself"
    return "done"


def main() -> None:
    """See the module's docstring."""
    recipe, calm, out, *limits = sys.argv[1:]
    torch.set_num_threads(1)  # the threads of a product do not outlive a fork
    api.run(recipe, out=calm)
    settle()
    places = []
    for limit in [*limits, "never"]:
        places.append(attempt(recipe, out, limit))
        if places[-1] == "done":
            break
    sys.stdout.write(json.dumps(places))


if __name__ == "__main__":
    main()
