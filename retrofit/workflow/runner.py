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

from retrofit.checkpoint.provenance import sha256
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.format import duration
from retrofit.kv_heads import VERSION as HEADS
from retrofit.system.memory import peak_bytes, reset_peak
from retrofit.system.resume import VERSION as EVALUATION
from retrofit.workflow.journal import CARD, Entry, Journal, digests_of, fingerprint, free_name
from retrofit.workflow.operations import Origin
from retrofit.workflow.plan import FOLDERS, STEPS
from retrofit.workflow.prepare import Prepared

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
        scratch: tuple[str, ...] = (),
    ) -> Entry:
        """Do one step. work: makes the artifact at the path it is given and returns what it found. also: what else the
        step writes into the run folder, with digests; scratch: the same without.

        A name may have a part after a colon (`evaluate:original`): a piece of a step that is kept for itself. Raises
        UserError, before the work, where somebody else put something into what would be replaced.
        """
        family = name.partition(":")[0]
        identity = fingerprint(name, VERSIONS[family], config, inputs)
        entry = None if family in self.again else self.journal.done(name, identity)
        if entry is None:
            self._require_ours(name, (artifact, *also, *scratch))
            entry = self._do(name, artifact, identity, work, also, scratch)
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

    def drop(self, path: str) -> None:
        """Remove what this run wrote at `path`; what it did not write stays, and a card that was edited is kept."""
        top = self.folder / path
        if not self.journal.claims(path):
            return
        self._keep_card(top / CARD)
        foreign = self.journal.foreign(path)
        if not foreign:
            shutil.rmtree(top, ignore_errors=True)
            return
        for file in sorted(top.rglob("*"), reverse=True):
            if file.is_dir() and not file.is_symlink():
                if not any(file.iterdir()):
                    file.rmdir()
            elif str(file.relative_to(self.folder)) not in foreign:
                file.unlink()

    def write_own(self, name: str, content: bytes) -> None:
        """Write a file at the top of the run folder; an earlier one that somebody edited is kept under another name."""
        if kept := self.journal.write_own(name, content):
            self.say(f"{name} was edited: the edited one is kept as {shown(kept)}")

    def say(self, text: str) -> None:
        """One line for the person who waits."""
        if self.progress:
            self.progress.note(text)

    def _require_ours(self, name: str, paths: tuple[str, ...]) -> None:
        """UserError where this step, and those after it, would replace what this run did not write."""
        family = name.partition(":")[0]
        later = [FOLDERS[step] for step in STEPS[STEPS.index(family) :] if self.prepared.plan.of(step)]
        foreign = [file for path in dict.fromkeys((*paths, *later, FINAL)) for file in self.journal.foreign(path)]
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise UserError(
                f"`{shown(foreign[0])}`{more} was not written by this run, and its folder has to be written again",
                where=shown(self.folder),
                fix="move it elsewhere, or give another --out",
            )

    def _keep_card(self, card: Path) -> None:
        """A card that somebody edited is kept beside the folder that goes."""
        entry = self.journal.latest("publish")
        written = (entry.result.get("card") if entry else None) if card.parent.name == FINAL else None
        if written is not None and card.is_file() and sha256(card) != written:
            kept = free_name(self.folder / f"{FINAL}-{CARD}")
            card.rename(kept)
            self.say(f"the edited card of what was published is kept as {shown(kept)}")

    def _do(
        self, name: str, artifact: str, identity: str, work: Work, also: tuple[str, ...], scratch: tuple[str, ...]
    ) -> Entry:
        plan = self.prepared.plan
        planned, expected = plan.of(name.partition(":")[0]), plan.seconds_of(name)
        assert planned is not None and expected is not None, f"{name} is not in the plan"
        self.say(f"{name}: {planned.does}; about {duration(expected)}" if ":" not in name else name)
        # What was published belongs to the checkpoint as it was before this step.
        self.drop(FINAL)
        self.journal.begin(name, (artifact, *also, *scratch))
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
