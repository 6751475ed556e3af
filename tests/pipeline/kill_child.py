"""Runs one recipe undisturbed, then again and again, each time killed at another moment, until an attempt ends.

`python -m tests.pipeline.kill_child RECIPE CALM HUNTED recover:3 0.5s`: the undisturbed run is in CALM. Of those in
HUNTED the first attempt gets SIGKILL at the third sign of life of the task `recover` (everything a run tells its
Progress is one), the next a deadly alarm after half a second. An attempt is a fork of this process. Prints where every
attempt died as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from retrofit.pipeline import commands
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


def attempt(recipe: str, out: str, limit: str) -> str:
    """Fork, run, and say where the attempt died, or `done`."""
    where, _, lives = limit.partition(":")
    note = Path(f"{out}.place")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if limit[:1].isdigit():
                # Without a handler the alarm ends the process at once, as SIGKILL does.
                signal.setitimer(signal.ITIMER_REAL, float(limit[:-1]))
            commands.run(recipe, out=out, progress=Mortal(where, int(lives or 0), note))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGALRM:
            return f"after {limit}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        place = note.read_text()
        note.unlink()
        return place
    assert os.WEXITSTATUS(status) == 0, "an attempt failed by itself"
    return "done"


def main() -> None:
    """See the module's docstring."""
    recipe, calm, out, *limits = sys.argv[1:]
    commands.run(recipe, out=calm)
    settle()
    places = []
    for limit in [*limits, "never"]:
        places.append(attempt(recipe, out, limit))
        if places[-1] == "done":
            break
    sys.stdout.write(json.dumps(places))


if __name__ == "__main__":
    main()
