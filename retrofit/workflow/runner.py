"""Steps in a run folder, each done once.

A step whose key stands in the journal and whose artifact is intact is not done again. So the same command resumes after
a kill, and a changed recipe repeats what it changed and what depends on it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrofit.checkpoint.provenance import sha256
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.format import duration
from retrofit.model.folder import ModelFolder
from retrofit.system.memory import peak_bytes, reset_peak
from retrofit.system.resume import ResumeKey
from retrofit.system.world import ALONE, Others, led
from retrofit.workflow.artifact import Artifact
from retrofit.workflow.context import ModelContext
from retrofit.workflow.joining import run_step, scratch_of
from retrofit.workflow.journal import CARD, FINAL, Entry, Journal, digests_of, free_name
from retrofit.workflow.step import Inputs, Place, Step
from retrofit.workflow.steps import FOLDERS
from retrofit.workflow.steps.convert import MOMENTS

Work = Callable[[], Mapping[str, Any]]


@dataclass
class Runner:
    """Does steps in one run folder, or finds them done, on rank 0. others: the other processes, which are called to
    what is distributed. again: steps to do whatever the journal says."""

    folder: Path
    context: ModelContext
    journal: Journal
    others: Others
    again: tuple[str, ...] = ()
    entries: dict[str, Entry] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def do(self, step: Step, inputs: Inputs) -> Inputs:
        """Do one step, or find it done; what there is for the next one."""
        folder, work, key = FOLDERS[step.name], f"{FOLDERS[step.name]}.work", step.key(self.context, inputs)
        place = Place(
            out=self.folder / folder,
            work=self.folder / work / key.digest[:16],
            moments=self.folder / MOMENTS if MOMENTS in step.unkept() else None,
            pieces=self,
            run=self.folder,
        )

        def done() -> Mapping[str, Any]:
            report = run_step(step, self.context, inputs, place, self.others)
            for path in step.stale():
                self.drop(path)
            return step.recorded(report)

        unkept = (work, *step.unkept())
        entry = self._once(step.name, folder, key, done, also=step.also(self.context, inputs), unkept=unkept)
        self.drop(work)  # not before the journal knows of the step
        report = step.restored(entry.result)
        models, label = dict(inputs.models), step.label(inputs.models)
        if label is not None:
            models.pop(label, None)  # it stands for both, and is the newest
            models[label] = self._made(step, entry, inputs.current)
        return replace(inputs, models=models, reports={**inputs.reports, step.name: report})

    def piece(
        self,
        name: str,
        file: str,
        key: ResumeKey,
        work: Callable[[Path, Path], Mapping[str, Any]],
        *,
        also: tuple[str, ...] = (),
    ) -> Mapping[str, Any]:
        """A part of a step, kept for itself: see `step.Pieces`. Its name has a part after a colon."""
        path, scratch = self.folder / file, scratch_of(self.folder, file)
        unkept = (str(scratch.relative_to(self.folder)),)

        def done(others: Others) -> Mapping[str, Any]:
            def together() -> Mapping[str, Any]:
                with others.join():
                    return work(path, scratch)

            entry = self._once(name, file, key, together, also=also, unkept=unkept)
            self.drop(*unkept)
            return entry.result

        return led(self.context.world if self.others.called else ALONE, done)

    def _once(
        self, name: str, artifact: str, key: ResumeKey, work: Work, *, also: tuple[str, ...], unkept: tuple[str, ...]
    ) -> Entry:
        """The journal's entry for this work, which is done now unless it was. artifact, also: what it writes, with
        digests; unkept: the same without. Raises UserError, before the work, where somebody else put something into
        what would be replaced."""
        family = name.partition(":")[0]
        entry = None if family in self.again else self.journal.done(name, key.digest)
        if entry is None:
            self._require_ours(family, (artifact, *also, *unkept))
            entry = self._do(name, artifact, key.digest, work, also, unkept)
            self.journal.append(entry)
        else:
            self.reused.append(name)
            self.entries |= {one.step: one for one in self.journal.pieces_of(entry)}
            self.context.note(f"{name}: done before, kept")
        self.entries[name] = entry
        return entry

    def _do(
        self, name: str, artifact: str, digest: str, work: Work, also: tuple[str, ...], unkept: tuple[str, ...]
    ) -> Entry:
        plan = self.context.plan
        planned, expected = plan.of(name.partition(":")[0]), plan.seconds_of(name)
        assert planned is not None, f"{name} is not in the plan"
        assert expected is not None, f"{name} is not in the plan"
        self.context.note(f"{name}: {planned.does}; about {duration(planned.seconds)}" if ":" not in name else name)
        # What was published belongs to the checkpoint as it was before this step.
        self.drop(FINAL)
        self.journal.begin(name, (artifact, *also, *unkept))
        known, began = set(self.entries), time.monotonic()
        reset_peak()
        result = work()
        inside = [entry for key, entry in self.entries.items() if key not in known and key not in self.reused]
        return Entry(
            step=name,
            fingerprint=digest,
            artifact=artifact,
            digests=digests_of(self.folder, [self.folder / path for path in (artifact, *also)]),
            seconds=round(time.monotonic() - began - sum(entry.seconds for entry in inside), 3),
            peak_bytes=max([peak_bytes(), *(entry.peak_bytes for entry in inside)]),
            predicted_seconds=round(expected, 3),
            predicted_peak_bytes=planned.peak_bytes,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            result=result,
        )

    def _made(self, step: Step, entry: Entry, before: Artifact) -> Artifact:
        """The checkpoint that a step wrote."""
        own = f"{entry.artifact}/"
        files = {name: value for name, value in entry.digests.items() if name.startswith(own) and _is_model(name)}
        digests = {Path(name).name: value for name, value in files.items()}
        after = step.after(before.provenance, entry.result)
        return Artifact(ModelFolder(self.folder / entry.artifact), digests, after)

    def drop(self, path: str) -> None:
        """Remove what this run wrote at `path`; what it did not write stays, and a card that was edited is kept."""
        top = self.folder / path
        if not self.journal.claims(path):
            return
        self._keep_card(top / CARD)
        foreign = self.journal.foreign(path)
        if not foreign:
            shutil.rmtree(top, ignore_errors=True)
            self.journal.release(path)
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
            self.context.note(f"{name} was edited: the edited one is kept as {shown(kept)}")

    def _require_ours(self, family: str, paths: tuple[str, ...]) -> None:
        """UserError where this step, and those after it, would replace what this run did not write."""
        names = [step.name for step in self.context.steps]
        later = [FOLDERS[name] for name in names[names.index(family) :]]
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
        recorded = [entry.result["card"] for entry in self.journal.entries if "card" in entry.result]
        written = recorded[-1] if recorded and card.parent.name == FINAL else None
        if written is not None and card.is_file() and sha256(card) != written:
            kept = free_name(self.folder / f"{FINAL}-{CARD}")
            card.rename(kept)
            self.context.note(f"the edited card of what was published is kept as {shown(kept)}")


def _is_model(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json", "/config.json"))
