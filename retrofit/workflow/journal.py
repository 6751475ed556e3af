"""The journal of a run: the mark of a run folder, and one JSON line for every step that is done. Torch-free.

Its first line says that the folder is a run's; a line before each step says what the step is about to write. What no
line names was put there by somebody else, and is neither removed nor replaced.

A step is done when its line is written; the line names the artifact and the sha256 of its files. A kill can leave an
artifact without its line (the step is done again) or a torn last line (it is dropped), never a line without artifact.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from io import FileIO
from pathlib import Path
from typing import Any

from retrofit.checkpoint.provenance import sha256, sha256_of
from retrofit.checkpoint.raw import write_all
from retrofit.errors import UserError
from retrofit.escape import shown

NAME = "journal.jsonl"
CARD = "README.md"  # people edit it
FINAL = "final"  # what can be published
_PUBLISHED_CARD = f"{FINAL}/{CARD}"
_HEADER: Mapping[str, Any] = {"retrofit": "run"}
_LONGEST_LINE = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One finished step. artifact and the keys of `digests` are paths relative to the run folder.

    result: what the step found, as JSON values; later steps and the report read it instead of asking again.
    """

    step: str
    fingerprint: str
    artifact: str
    digests: Mapping[str, str]
    seconds: float = 0.0
    peak_bytes: int = 0
    predicted_seconds: float | None = None
    predicted_peak_bytes: int | None = None
    finished: str = ""
    result: Mapping[str, object] = field(default_factory=dict)


def digests_of(run: Path, paths: Iterable[Path]) -> dict[str, str]:
    """sha256 of every file under `paths` (files or folders), by path relative to the run folder.

    Model cards (README.md) are left out: people edit them.
    """
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    files = [file for file in files if file.name != CARD]
    return {str(file.relative_to(run)): found for file, found in zip(files, sha256_of(files), strict=True)}


def is_run(folder: Path) -> bool:
    """Whether `folder` holds the journal of a run, which only a run writes there."""
    first = _first_line(folder)
    return first.get("retrofit") == _HEADER["retrofit"] or {"step", "fingerprint", "digests"} <= first.keys()


def begun_rows(folder: Path) -> int | None:
    """Rows of a training step by default in the run that has begun in `folder`; None where none has."""
    rows = _first_line(folder).get("rows", 1) if is_run(folder) else None
    return rows if isinstance(rows, int) and rows > 0 else None


def _first_line(folder: Path) -> dict[str, Any]:
    """The first line of the journal in a folder; empty where there is none, or it is somebody else's."""
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        return {}
    with path.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


class Journal:
    """The lines of `journal.jsonl`, the newest of a step counting."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / NAME
        self.entries: list[Entry] = []
        self._claimed: dict[str, Entry | None] = {}  # by path: the step that wrote it, None while it is made
        self._begun: dict[str, list[str]] = {}  # by step: the paths it was about to write
        self._written: dict[str, set[str]] = {}  # by file: digests of what was ever written under that name
        self._whole = 0  # bytes up to the end of the last whole line
        if self.path.exists():
            self._read()

    def done(self, step: str, fingerprint: str) -> Entry | None:
        """The newest entry of `step`, if it has this fingerprint and its artifact is still what it was."""
        entry = self.latest(step)
        return entry if entry and entry.fingerprint == fingerprint and self.intact(entry) else None

    def latest(self, step: str) -> Entry | None:
        """The newest entry of `step`."""
        return next((entry for entry in reversed(self.entries) if entry.step == step), None)

    def pieces_of(self, entry: Entry) -> list[Entry]:
        """The parts of a step that are kept for themselves, as this entry of it holds them."""
        parts = {one.step: one for one in self.entries if one.step.startswith(f"{entry.step}:")}
        return [one for one in parts.values() if one.artifact in entry.digests]

    def intact(self, entry: Entry) -> bool:
        """Every file of the artifact is there with the recorded digest."""
        files = ((self.run / name, digest) for name, digest in entry.digests.items())
        return (self.run / entry.artifact).exists() and all(p.is_file() and sha256(p) == d for p, d in files)

    def mark(self, rows: int = 1) -> None:
        """Make the folder a run's, if it is not one yet. rows: see `begun_rows`."""
        if not self.path.exists():
            self._line({**_HEADER, "rows": rows})

    def begin(self, step: str, paths: Iterable[str]) -> None:
        """Say what a step is about to write. paths: relative to the run folder."""
        paths = list(paths)
        self._line({"begins": step, "paths": paths})
        self._take(step, paths)

    def append(self, entry: Entry) -> None:
        """Write one line, durable before this returns; what a kill tore off after the last whole line goes."""
        self._line(asdict(entry))
        self._add(entry)

    def release(self, path: str) -> None:
        """What was written at `path` is gone: what comes there afterwards is somebody else's."""
        if path in self._claimed:
            self._line({"drops": path})
            del self._claimed[path]

    def claims(self, path: str) -> bool:
        """Whether a step of this run wrote what is at `path`, or into it."""
        return any(own == path or own.startswith(f"{path}/") or path.startswith(f"{own}/") for own in self._claimed)

    def foreign(self, path: str) -> list[str]:
        """Files at `path` and below that no step of this run wrote, relative to the run folder."""
        top = self.run / path
        if not os.path.lexists(top):
            return []
        there = [path] if top.is_symlink() or not top.is_dir() else sorted(_below(self.run, top))
        if not self.claims(path):
            return there or [path]
        known = {name for entry in self._claimed.values() if entry for name in entry.digests} | {_PUBLISHED_CARD}
        # What is being made, and what no digests are kept of, is the step's altogether.
        unknown = [own for own, entry in self._claimed.items() if entry is None or not _below_any(own, known)]
        return [
            name
            for name in there
            if name not in known and not any(name == own or name.startswith(f"{own}/") for own in unknown)
        ]

    def write_own(self, name: str, content: bytes) -> Path | None:
        """Write a file of the run's own at the top of its folder, whole or not at all.

        What somebody made of an earlier one is kept under another name, which is returned.
        """
        path, digest = self.run / name, hashlib.sha256(content).hexdigest()
        aside = None
        if os.path.lexists(path) and not self._wrote(path, digest):
            aside = free_name(path)
            path.rename(aside)
        if digest not in self._written.get(name, ()):
            self._line({"writes": name, "sha256": digest})
            self._written.setdefault(name, set()).add(digest)
        partial = path.with_name(f".{name}.partial")
        partial.unlink(missing_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
        return aside

    def _wrote(self, path: Path, digest: str) -> bool:
        """Whether the file is one that this run wrote, or what it is about to write."""
        known = {digest, *self._written.get(path.name, ())}
        return path.is_file() and not path.is_symlink() and sha256(path) in known

    def _line(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(dict(values), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        new = not self.path.exists()
        try:
            with FileIO(self.path, "xb" if new else "r+b") as handle:
                handle.truncate(self._whole)
                handle.seek(self._whole)
                write_all(handle, memoryview(line))
                os.fsync(handle.fileno())
        except OSError:
            if new:  # a folder with half a mark would be nobody's
                self.path.unlink(missing_ok=True)
            raise
        self._whole += len(line)

    def _take(self, step: str, paths: list[str]) -> None:
        self._begun[step] = paths
        self._claimed |= dict.fromkeys(paths)

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        paths = self._begun.pop(entry.step, [])
        tops = {name.partition("/")[0] for name in entry.digests}
        self._claimed |= dict.fromkeys((entry.artifact, *tops, *paths), entry)

    def _read(self) -> None:
        known = {f.name for f in fields(Entry)}
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                entry = None
                if not self._noted(values):
                    entry = Entry(**{key: value for key, value in values.items() if key in known})
                    _require_entry(entry)
            except (ValueError, TypeError, AttributeError, RecursionError):
                if number == len(lines):
                    return
                raise UserError(
                    "the journal of this run is damaged",
                    where=f"{self.path}:{number}",
                    fix="delete that line (its step is done again) or use another --out",
                ) from None
            if not line.endswith(b"\n"):
                return
            if entry is not None:
                self._add(entry)
            self._whole += len(line)

    def _noted(self, values: Mapping[str, Any]) -> bool:
        """Take over a line that is no entry; False for an entry."""
        if "begins" in values:
            _require_texts(values["begins"], *values.get("paths", [None]))
            self._take(values["begins"], list(values["paths"]))
        elif "writes" in values:
            _require_texts(values["writes"], values.get("sha256"))
            self._written.setdefault(values["writes"], set()).add(values["sha256"])
        elif "drops" in values:
            _require_texts(values["drops"])
            self._claimed.pop(values["drops"], None)
        return any(kind in values for kind in ("retrofit", "begins", "writes", "drops"))


def _require_entry(entry: Entry) -> None:
    """ValueError for a line whose values this program did not write."""
    _require_texts(entry.step, entry.fingerprint, entry.artifact, *entry.digests.keys(), *entry.digests.values())
    if not isinstance(entry.result, dict):
        raise ValueError


def _require_texts(*values: object) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ValueError


def _below_any(path: str, names: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}/") for name in names)


def _below(run: Path, folder: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def free_name(path: Path) -> Path:
    """A name to keep an edited file under: `recipe.edited.yaml` for `recipe.yaml`, numbered where that is taken."""
    for number in range(1, 10_000):
        name = path.with_name(f"{path.stem}.edited{'' if number == 1 else f'-{number}'}{path.suffix}")
        if not os.path.lexists(name):
            return name
    raise UserError("there is no name left to keep an edited file under", where=shown(path), fix="remove some")
