"""What people and machines see: progress on stderr, results on stdout.

Three modes from one place: `rich` on a terminal, `plain` lines otherwise, `json` for machines (one JSON document on
stdout, nothing else there). Long functions take a `Progress`, or None to be silent, and never know which one it is.
Names in what is shown are foreign: their control characters are shown as escapes, and nothing in them is markup.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TextIO, runtime_checkable

from retrofit.escape import json_text, visible
from retrofit.format import amount, count, duration, nbytes
from retrofit.tables import NOTE, Part, plain_text, print_rich

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID

Mode = Literal["rich", "plain", "json"]
PLAIN_SECONDS = 10.0  # a plain log gets at most one line in this time


@runtime_checkable
class Progress(Protocol):
    """How a long function tells where it is. One task at a time; `start` ends the task before."""

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Begin `task` of `total` units (None when unknown)."""

    def advance(self, n: int, **fields: float | str) -> None:
        """`n` units more are done; fields are shown beside the bar, for example loss=1.2."""

    def finish(self) -> None:
        """The task is done."""

    def note(self, text: str) -> None:
        """One line worth keeping: a choice, a fallback."""


class Silent:
    """A Progress that keeps its notes and shows nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, task: str, total: int | None, unit: str) -> None: ...

    def advance(self, n: int, **fields: float | str) -> None: ...

    def finish(self) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


class PlainProgress:
    """Lines: one at the start, one every `PLAIN_SECONDS`, one at the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._task, self._unit, self._done = "", "", 0
        self._total: int | None = None
        self._began = self._last = 0.0
        self._fields: Mapping[str, float | str] = {}
        self._open = False
        self.noted: set[str] = set()

    def start(self, task: str, total: int | None, unit: str) -> None:
        self.finish()
        self._task, self._total, self._unit, self._done, self._fields = task, total, unit, 0, {}
        self._began = self._last = self._clock()
        self._open = True

    def advance(self, n: int, **fields: float | str) -> None:
        self._done += n
        self._fields = {**self._fields, **fields}
        if self._clock() - self._last >= PLAIN_SECONDS and self._done != self._total:
            self._last = self._clock()
            self._write(self._line())

    def finish(self) -> None:
        if self._open:
            self._open = False
            self._write(f"{self._line()} in {duration(self._clock() - self._began)}")

    def note(self, text: str) -> None:
        self.noted.add(text)
        self._write(f"  {text}")

    def _line(self) -> str:
        elapsed = self._clock() - self._began
        line = f"  {self._task}"
        if self._total:
            done = nbytes(self._done) if self._unit == "B" else count(self._done)
            line += f": {done} of {amount(self._total, self._unit)}"
        elif self._done:
            line += f": {amount(self._done, self._unit)}"
        extra = _shown(self._fields)
        if elapsed > 0.5 and self._done:
            extra.append(f"{amount(self._done / elapsed, self._unit)}/s")
            if self._open and self._total and self._total > self._done:
                extra.append(f"{duration(elapsed / self._done * (self._total - self._done))} left")
        return f"{line}, {', '.join(extra)}" if extra else line

    def _write(self, line: str) -> None:
        self._stream.write(visible(line) + "\n")
        self._stream.flush()


class RichProgress:
    """A bar with rate, fields and time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as RichConsole

        self._console = RichConsole(file=stream)
        self._bar: RichBar | None = None
        self._task: TaskID | None = None
        self._fields: dict[str, float | str] = {}
        self._unit, self._done, self._began = "", 0, 0.0
        self.noted: set[str] = set()

    def start(self, task: str, total: int | None, unit: str) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBar

        self.finish()
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%" if total else "{task.completed}"),
            TextColumn("{task.fields[info]}", markup=False),
            TimeRemainingColumn(),
        )
        self._unit, self._done, self._began, self._fields = unit, 0, time.monotonic(), {}
        self._bar = RichBar(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(visible(task), total=total, info="")
        self._bar.start()

    def advance(self, n: int, **fields: float | str) -> None:
        if self._bar is None or self._task is None:
            return
        self._done += n
        self._fields.update(fields)
        rate = self._done / max(time.monotonic() - self._began, 1e-6)
        shown = [f"{amount(rate, self._unit)}/s"] if self._unit else []
        shown += _shown(self._fields)
        self._bar.update(self._task, advance=n, info="  ".join(shown))

    def finish(self) -> None:
        if self._bar is not None and self._task is not None:
            description = self._bar.tasks[0].description
            self._bar.stop()
            self._bar = None
            elapsed = duration(time.monotonic() - self._began)
            done = amount(self._done, self._unit) if self._done else ""
            self.note(", ".join([description, *filter(None, [done]), *_shown(self._fields), elapsed]))

    def note(self, text: str) -> None:
        self.noted.add(text)
        self._console.print(f"  {visible(text)}", style="dim", markup=False, highlight=False, emoji=False)


def _shown(fields: Mapping[str, float | str]) -> list[str]:
    return [
        f"{key} {value:.4g}" if isinstance(value, float) else visible(f"{key} {value}") for key, value in fields.items()
    ]


class Console:
    """Where a command writes. stdout carries the result, stderr everything on the way."""

    def __init__(self, mode: Mode | None = None, *, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.mode: Mode = mode or ("rich" if self.out.isatty() else "plain")
        self.progress: RichProgress | PlainProgress
        self.progress = RichProgress(self.err) if self.err.isatty() else PlainProgress(self.err)
        self._together = (self.mode == "rich" and self.err.isatty()) or _one_place(self.out, self.err)

    def say(self, text: str) -> None:
        """A line of the result for people; machines get `result` alone."""
        if self.mode != "json":
            self.out.write(visible(text, keep="\n") + "\n")

    def show(self, value: object, parts: Iterable[Part]) -> None:
        """A result: `value` for machines, the parts for people; without the notes that its reader has seen on the
        way."""
        self.result(value)
        for part in parts if self.mode != "json" else ():
            if isinstance(part, str) and self._seen(part):
                continue
            if isinstance(part, str):
                self.say(part)
            elif self.mode == "rich":
                print_rich(part, self.out)
            else:
                self.say(plain_text(part))

    def _seen(self, line: str) -> bool:
        """Whether a line is a note that stands further up in the same terminal, file or pipe."""
        return self._together and line.removeprefix(NOTE) in self.progress.noted

    def result(self, value: object) -> None:
        """The whole result for machines: one JSON document."""
        if self.mode == "json":
            ascii_only = not (getattr(self.out, "encoding", None) or "utf-8").lower().startswith("utf")
            self.out.write(to_json(value, ascii_only=ascii_only) + "\n")


def _one_place(out: TextIO, err: TextIO) -> bool:
    """Whether both streams are one terminal, file or pipe, as in `> log 2>&1`."""
    try:
        return os.path.sameopenfile(out.fileno(), err.fileno())
    except (OSError, ValueError):  # not those of a process, or closed
        return out is err


def jsonable(value: object) -> object:
    """Dataclasses, pydantic models, arrays, paths and tuples as JSON values; NaN and infinities become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return jsonable(value.model_dump(mode="json"))
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, Iterable):
        return [jsonable(item) for item in value]
    return str(value)


def to_json(value: object, *, ascii_only: bool = False) -> str:
    """One indented JSON document, without control characters of a terminal.

    ascii_only: all other characters as escapes as well, for a stream that cannot hold them.
    """
    return json_text(json.dumps(jsonable(value), indent=2, ensure_ascii=ascii_only))
