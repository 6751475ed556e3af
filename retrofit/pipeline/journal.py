"""The journal of a run: one JSON line for every step that is done. Torch-free.

A step is done when its line is written; the line names the artifact and the sha256 of its files. A kill can leave an
artifact without its line (the step is done again) or a torn last line (it is dropped), never a line without artifact.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from retrofit.checkpoint.provenance import sha256
from retrofit.errors import UserError

NAME = "journal.jsonl"


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


def fingerprint(step: str, version: str, config: object, inputs: Mapping[str, object]) -> str:
    """sha256 of everything a step's artifact depends on: its own configuration, its inputs, and its code's version."""
    canonical = json.dumps([step, version, config, dict(inputs)], sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def digests_of(run: Path, paths: Iterable[Path]) -> dict[str, str]:
    """sha256 of every file under `paths` (files or folders), by path relative to the run folder.

    Model cards (README.md) are left out: people edit them.
    """
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    return {str(file.relative_to(run)): sha256(file) for file in files if file.name != "README.md"}


class Journal:
    """The lines of `journal.jsonl`, the newest of a step counting."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / NAME
        self.entries: list[Entry] = []
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

    def intact(self, entry: Entry) -> bool:
        """Every file of the artifact is there with the recorded digest."""
        files = ((self.run / name, digest) for name, digest in entry.digests.items())
        return (self.run / entry.artifact).exists() and all(p.is_file() and sha256(p) == d for p, d in files)

    def append(self, entry: Entry) -> None:
        """Write one line, durable before this returns; what a kill tore off after the last whole line goes."""
        line = json.dumps(asdict(entry), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self.path.open("r+b" if self.path.exists() else "wb") as handle:
            handle.truncate(self._whole)
            handle.seek(self._whole)
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())
        self._whole += len(line)
        self.entries.append(entry)

    def _read(self) -> None:
        known = {f.name for f in fields(Entry)}
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                entry = Entry(**{key: value for key, value in values.items() if key in known})
            except (ValueError, TypeError, AttributeError):
                if number == len(lines):
                    return
                raise UserError(
                    "the journal of this run is damaged",
                    where=f"{self.path}:{number}",
                    fix="delete that line (its step is done again) or use another --out",
                ) from None
            if not line.endswith(b"\n"):
                return
            self.entries.append(entry)
            self._whole += len(line)
