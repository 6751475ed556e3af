"""Steps in a run folder, each done once.

A step whose fingerprint stands in the journal and whose artifact is intact is not done again. So the same command goes
on after a kill, and a changed recipe repeats what it changed and what depends on it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.console import seconds as duration
from retrofit.evaluate.resume import VERSION as EVALUATION
from retrofit.kv_heads import VERSION as HEADS
from retrofit.pipeline.journal import Entry, Journal, digests_of, fingerprint
from retrofit.pipeline.measure import peak_bytes, reset_peak
from retrofit.pipeline.operations import Origin
from retrofit.pipeline.prepare import Prepared

if TYPE_CHECKING:
    from retrofit.console import Progress

# What a step writes depends on its code too: raise its number when the same inputs would give another artifact.
VERSIONS = {
    "convert": f"3, heads {HEADS}",
    "extend": "3",
    "recover": "2",
    "evaluate": str(EVALUATION),
    "publish": "2",
}
FINAL = "final"

Work = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class State:
    """A checkpoint of the run: where it is, the digests that identify it, and what it was made by."""

    path: Path
    identity: Mapping[str, str]
    origin: Origin


@dataclass
class Runner:
    """Does steps in one run folder, or finds them done. again: steps to do whatever the journal says."""

    folder: Path
    prepared: Prepared
    journal: Journal
    again: tuple[str, ...] = ()
    progress: Progress | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def step(
        self,
        name: str,
        artifact: str,
        config: object,
        inputs: Mapping[str, object],
        work: Work,
        also: tuple[str, ...] = (),
    ) -> Entry:
        """Do one step. work: makes the artifact at the path it is given and returns what it found. also: what else the
        step writes into the run folder.

        A name may have a part after a colon (`evaluate:original`): a piece of a step that is kept for itself.
        """
        family = name.partition(":")[0]
        identity = fingerprint(name, VERSIONS[family], config, inputs)
        entry = None if family in self.again else self.journal.done(name, identity)
        if entry is None:
            entry = self._do(name, artifact, identity, work, also)
            self.journal.append(entry)
        else:
            self.reused.append(name)
            self.say(f"{name}: done before, kept")
        self.entries[name] = entry
        return entry

    def made(self, entry: Entry, origin: Origin) -> State:
        """The checkpoint that a step wrote."""
        digests = {Path(name).name: value for name, value in entry.digests.items() if _is_model(name)}
        return State(self.folder / entry.artifact, digests, origin)

    def say(self, text: str) -> None:
        """One line for the person who waits."""
        if self.progress:
            self.progress.note(text)

    def _do(self, name: str, artifact: str, identity: str, work: Work, also: tuple[str, ...]) -> Entry:
        plan = self.prepared.plan
        planned, expected = plan.of(name.partition(":")[0]), plan.seconds_of(name)
        assert planned is not None and expected is not None, f"{name} is not in the plan"
        self.say(f"{name}: {planned.does}; about {duration(expected)}" if ":" not in name else name)
        # What was published belongs to the checkpoint as it was before this step.
        shutil.rmtree(self.folder / FINAL, ignore_errors=True)
        reset_peak()
        began = time.monotonic()
        result = work(self.folder / artifact)
        return Entry(
            step=name,
            fingerprint=identity,
            artifact=artifact,
            digests=digests_of(self.folder, [self.folder / path for path in (artifact, *also)]),
            seconds=round(time.monotonic() - began, 3),
            peak_bytes=peak_bytes(),
            predicted_seconds=round(expected, 3),
            predicted_peak_bytes=planned.peak_bytes,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            result=result,
        )


def _is_model(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json", "/config.json"))
