"""What an evaluation keeps: token losses, those of further passes, and answers to tasks.

`retrofit evaluate --out` keeps them beside each other; the file of token losses comes last and says which question it
answers: with it, all the others are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retrofit.checkpoint.staging import name_file
from retrofit.console import jsonable
from retrofit.errors import UserError
from retrofit.evaluation.continuations import Continuation
from retrofit.evaluation.files import pass_file
from retrofit.evaluation.metrics.context_use import restored
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.summary import Kept
from retrofit.evaluation.tasks.answers import (
    TaskAnswers,
    answers_file,
    beside,
    from_file,
    samples_file,
    to_file,
)
from retrofit.workflow.outputs import QUESTION

_CONTEXT, _REASON = "long_context", "kernel_reason"


def kept_in_run(losses: Path, passes: Iterable[str], scored: Mapping[str, Any], answers: Iterable[Path]) -> Kept:
    """What a run keeps of one model. losses: the file of its token losses. passes: names of its further passes. scored:
    what stands beside the losses in the journal. answers: files of its answers to tasks."""
    tasks: dict[str, TaskAnswers] = {}
    for file in answers:
        tasks |= from_file(file)
    return Kept(
        TokenLosses.load(losses),
        {name: TokenLosses.load(pass_file(losses, name)) for name in passes},
        restored(scored["answers"]),
        scored["kernel"],
        scored["reason"],
        tuple(Continuation(**one) for one in scored["continuations"]),
        tasks,
    )


@dataclass(frozen=True)
class Stored:
    """The files of one evaluation. question: digest of what it was asked. passes: names of its further passes. logged:
    whether it keeps the prompts and answers of its tasks."""

    out: Path
    question: str
    passes: tuple[str, ...]
    logged: bool = False

    @property
    def beside(self) -> tuple[Path, ...]:
        """The other files than the token losses."""
        answers = beside(self.out)
        also = (samples_file(answers),) if self.logged else ()
        return (*(pass_file(self.out, name) for name in self.passes), answers, *also)

    def write(self, found: Kept, work: Path, *, overwrite: bool) -> Kept:
        """Write all files, each whole or not at all. work: a folder on the same disk. Raises UserError where one of
        them has come meanwhile, unless it may be replaced."""
        meta = {
            **found.losses.meta,
            QUESTION: self.question,
            _CONTEXT: jsonable(found.answers),
            _REASON: found.reason,
        }
        losses = replace(found.losses, meta=meta)
        for name, scored in found.passes.items():
            self._put(scored, pass_file(self.out, name), work, overwrite)
        if found.tasks:
            partial = work / "answers.json"
            to_file(found.tasks, partial)
            name_file(partial, beside(self.out), overwrite=overwrite)
        elif overwrite:
            beside(self.out).unlink(missing_ok=True)  # of what is replaced
        if self.logged:
            partial, log = work / "samples.jsonl", samples_file(beside(self.out))
            with partial.open("wb") as whole:
                for name in found.tasks:
                    part = samples_file(answers_file(work, "model", name))
                    if part.is_file():  # a task that is built in has none
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, whole)
            name_file(partial, log, overwrite=overwrite)
        self._put(losses, self.out, work, overwrite)
        return replace(found, losses=losses)

    def read(self) -> Kept | None:
        """What `write` left, None where some of it is gone or damaged."""
        try:
            losses = TokenLosses.load(self.out)
            answers = restored(losses.meta[_CONTEXT])  # type: ignore[arg-type]
            kernel, reason = str(losses.meta["kernel"]), str(losses.meta[_REASON])
            passes = {name: TokenLosses.load(pass_file(self.out, name)) for name in self.passes}
            tasks = from_file(beside(self.out)) if beside(self.out).is_file() else {}
            if self.logged and not samples_file(beside(self.out)).is_file():
                return None
        except (UserError, ValidationError, KeyError, TypeError):
            return None
        return Kept(losses, passes, answers, kernel, reason, (), tasks)

    @staticmethod
    def _put(losses: TokenLosses, path: Path, work: Path, overwrite: bool) -> None:
        partial = work / f"{path.name}.partial"
        losses.save(partial)
        name_file(partial, path, overwrite=overwrite)
