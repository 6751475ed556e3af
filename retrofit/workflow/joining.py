"""A step in one process or in several: rank 0 does what is around it, and calls the others where all take part."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrofit.checkpoint.config import CONFIG
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.system.resume import ResumeKey
from retrofit.system.world import Others, World, led
from retrofit.workflow.context import ModelContext
from retrofit.workflow.step import Inputs, Place, Step

_SEEN_WITHIN = 60.0  # seconds; NFS keeps what it knows of a folder for up to 60


@dataclass(frozen=True)
class Part:
    """What other processes need to know of a step to take part in it. name: of the step."""

    name: str
    inputs: Inputs
    place: Place


def run_step(step: Step, context: ModelContext, inputs: Inputs, place: Place, others: Others) -> Any:
    """Do a step on rank 0, with the other processes where it is distributed; returns its report."""
    if not step.distributed:
        return step.run(context.alone_in_world(), inputs, place)
    with others.join(Part(step.name, inputs, replace(place, pieces=None, before_replacing=None))):
        return step.run(context, inputs, place)


def taking_part(context: ModelContext) -> Callable[[Part], None]:
    """What another process than rank 0 does for a `Part`: the same step, whose report rank 0 has."""

    def take(part: Part) -> None:
        [step] = [step for step in context.steps if step.name == part.name]
        for model in part.inputs.models.values():
            await_folder(model.path)
        pieces = None if part.place.run is None else JoinedPieces(part.place.run, context.world)
        step.run(context, part.inputs, replace(part.place, pieces=pieces))

    return take


def await_folder(folder: Path) -> None:
    """Return when a checkpoint that rank 0 has written is seen here: a network file system may show it some seconds
    later. Raises UserError where it is not."""
    until = time.monotonic() + _SEEN_WITHIN
    while not (folder / CONFIG).is_file():
        if time.monotonic() > until:
            raise UserError(
                "a checkpoint that rank 0 has written is not seen by every process",
                where=f"{shown(folder)} on {socket.gethostname()}",
                fix="write to a disk that all nodes share",
            )
        time.sleep(0.2)


@dataclass
class JoinedPieces:
    """Pieces of a step in another process than rank 0, which keeps them: see `step.Pieces`."""

    folder: Path
    world: World

    def piece(
        self,
        name: str,
        file: str,
        key: ResumeKey,
        work: Callable[[Path, Path], Any],
        *,
        also: tuple[str, ...] = (),
    ) -> Any:
        """What rank 0 has of this piece, in whose work this process takes part if it is not there yet."""
        assert not self.world.main
        return led(self.world, lambda others: None, lambda _: work(self.folder / file, scratch_of(self.folder, file)))


def scratch_of(folder: Path, file: str) -> Path:
    """Return the folder from which a piece that is being made is resumed."""
    return folder / f"{file}.scored"
