"""What a step reads and writes: a checkpoint folder, the digests that identify it, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from retrofit.checkpoint.provenance import FILE, digest, read_provenance, versions, write_provenance
from retrofit.console import jsonable
from retrofit.data.seen import READ, Read
from retrofit.model.folder import ModelFolder
from retrofit.model.source import Source
from retrofit.recipe.schema import Recipe
from retrofit.workflow.public import source_record

T = TypeVar("T")

_OF_THE_MOMENT = ("seconds", "peak_bytes", "tokens_per_second", "resumed_from", "notes")


@dataclass(frozen=True)
class Provenance:
    """What a written folder records about itself. source: of the original model; steps: those before this one.

    question: digest of everything that a command of one step was asked; None in a run, whose journal knows that, and
    which files it wrote.
    """

    source: Mapping[str, object]
    steps: tuple[Mapping[str, object], ...] = ()
    question: str | None = None

    @classmethod
    def of(cls, source: Source, question: str | None = None) -> Provenance:
        """Of what is made of a model: its own record goes on when this program wrote it."""
        if question is not None and (source.folder / FILE).is_file():
            record = read_provenance(source.folder)
            return cls(record.get("source") or source_record(source), tuple(record.get("steps") or ()), question)
        return cls(source_record(source), (), question)

    def after(self, step: str, config: object, report: Mapping[str, object], read: Read | None = None) -> Provenance:
        """The same with one more step. read: by purpose, the kinds of text that it has read."""
        record = {"step": step, "config": config, READ: dict(read or {}), "result": _timeless(report)}
        return replace(self, steps=(*self.steps, record))

    def write(self, folder: Path) -> None:
        """Write retrofit.json into the folder, which is whole but for that."""
        own = self.question is not None
        asked = {"question": self.question, "files": digest(folder, everything=True)} if own else {}
        write_provenance(folder, {"source": self.source, "steps": self.steps, "versions": versions(), **asked})


@dataclass(frozen=True)
class Artifact:
    """A checkpoint folder. digests: of its configuration and weights, by file name."""

    model: ModelFolder
    digests: Mapping[str, str]
    provenance: Provenance

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.model.path


def as_json(report: object) -> dict[str, Any]:
    """A report as JSON values."""
    found = jsonable(report)
    assert isinstance(found, dict)
    return found


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """The report that `as_json` made these values of. Raises pydantic.ValidationError for anything else."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(values)


def shard_size(recipe: Recipe) -> str:
    """The largest weight file that the steps write: that of the published folder, so it can be linked there."""
    return recipe.publish.max_shard_size if recipe.publish else "5GB"


def _timeless(value: Any) -> Any:
    """Without clock, memory and interruptions, so that the same inputs give the same bytes."""
    if isinstance(value, Mapping):
        return {key: _timeless(item) for key, item in value.items() if key not in _OF_THE_MOMENT}
    return [_timeless(item) for item in value] if isinstance(value, list | tuple) else value
