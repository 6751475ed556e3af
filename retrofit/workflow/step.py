"""A step: what it refuses, what it costs, what its result depends on, and its work.

`plan`, a dry run, a run and the command of one step are walks over the same steps; each asks them what it needs. A
step's number in a run folder and its place in the row come from `steps.STEPS`; nothing else knows a step by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from retrofit.checkpoint.staging import staged
from retrofit.recipe.schema import Recipe, TextSource
from retrofit.system.resume import ResumeKey
from retrofit.workflow.artifact import Artifact, Provenance, as_json
from retrofit.workflow.estimate.cost import Cost, CostModel

if TYPE_CHECKING:
    from retrofit.data.seen import Purpose
    from retrofit.workflow.context import ModelContext


@dataclass(frozen=True)
class Inputs:
    """What the steps before have made. models: checkpoints by label, the original first. reports: by name of the step.

    moments: whether a folder for moments was asked for.
    """

    models: Mapping[str, Artifact]
    reports: Mapping[str, Any] = field(default_factory=dict)
    moments: bool = False

    @property
    def current(self) -> Artifact:
        """The newest checkpoint, which the next step reads."""
        return list(self.models.values())[-1]

    @property
    def label(self) -> str:
        """What the newest checkpoint is called."""
        return list(self.models)[-1]

    @property
    def digests(self) -> dict[str, str]:
        """Those of the newest checkpoint."""
        return dict(self.current.digests)


class Pieces(Protocol):
    """Where a step keeps parts of its work that outlive a change of the rest: one model's losses, one task's answers.

    folder: files are named relative to it.
    """

    folder: Path

    def piece(
        self,
        name: str,
        file: str,
        key: ResumeKey,
        work: Callable[[Path, Path], Mapping[str, Any]],
        *,
        also: tuple[str, ...] = (),
    ) -> Mapping[str, Any]:
        """What `work(file, scratch)` found, now or before. also: other files that it writes beside `file`."""


@dataclass(frozen=True)
class Place:
    """Where a step writes. out: its artifact. work: a folder of this very question, from which a later attempt
    resumes. moments: a folder for those of a conversion. overwrite: `out` may hold an earlier result. run: the folder
    of a run, and pieces: where it keeps parts of a step. before_replacing: called before an earlier result goes."""

    out: Path
    work: Path
    moments: Path | None = None
    overwrite: bool = True
    pieces: Pieces | None = None
    run: Path | None = None
    before_replacing: Callable[[], object] | None = None

    def staged(self, keep: Path | None = None) -> AbstractContextManager[Path]:
        """The folder to write in, which becomes `out` when the block ends well. keep: a folder of `work` to use."""
        return staged(self.out, overwrite=self.overwrite, keep=keep, before_replacing=self.before_replacing)


class Step(ABC):
    """One step of a recipe. section: its part of the recipe."""

    name: ClassVar[str]
    version: ClassVar[str]
    """What it writes depends on its code too: raised when the same inputs would give another artifact."""

    def __init__(self, recipe: Recipe, section: Any) -> None:
        self.recipe, self.section = recipe, section

    @property
    def texts(self) -> tuple[TextSource, ...]:
        """The text it reads."""
        return ()

    gated: ClassVar[bool] = False
    """Whether it is done only where the recipe's requirements are met."""
    reads_for: ClassVar[Purpose] = "calibration"
    """What it reads text for."""
    learns: ClassVar[bool] = False
    """Whether it fits something to its text, so that nothing may be measured on it."""

    @property
    def distributed(self) -> bool:
        """Whether every process takes part in `run`, by `context.world`; rank 0 alone writes and returns what counts.
        Otherwise rank 0 does it alone, in a context whose world is one process."""
        return False

    @property
    def keeps_work(self) -> bool:
        """Whether it keeps what a later attempt resumes from."""
        return True

    @property
    def begun_with(self) -> str:
        """What its own command needs to know before it resumes: a line."""
        return ""

    def label(self, models: Iterable[str]) -> str | None:
        """What the checkpoint it writes is called; None for a step that writes none. models: those before it."""
        return None

    def reads_by_name(self, context: ModelContext) -> bool:
        """Whether it changes tensors that it finds by their names."""
        return False

    def check_options(self) -> Iterable[str]:
        """Notes for people; UserError for what its section alone shows to be wrong, before a model is looked at."""
        return ()

    def check(self, context: ModelContext) -> Iterable[str]:
        """Notes; UserError for what is not possible on a model with this configuration. No weights are read."""
        return ()

    def check_here(self, context: ModelContext) -> Iterable[str]:
        """Notes; UserError for what this machine cannot do, or publishing will lack."""
        return ()

    def check_data(self, context: ModelContext, *, weights: bool, sample: bool) -> Iterable[str]:
        """Notes; UserError for what tokenizer and texts show to be wrong. weights: they are on this machine. sample:
        the model may be asked to write text of its own."""
        return ()

    def room(self, context: ModelContext) -> int:
        """Bytes that its work folder takes at most, beside what it writes."""
        return 0

    @abstractmethod
    def estimate(self, model: CostModel) -> Cost:
        """What it does and costs."""

    @abstractmethod
    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        """What its result depends on."""

    @abstractmethod
    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> Any:
        """Do it; returns its report."""

    def record(self) -> object:
        """Its section as a checkpoint's record keeps it."""
        return self.section.model_dump(mode="json")

    def recorded(self, report: Any) -> dict[str, Any]:
        """Its report as JSON values, as the journal and a checkpoint's record keep it."""
        return as_json(report)

    def after(self, provenance: Provenance, report: Mapping[str, Any]) -> Provenance:
        """What a checkpoint that it wrote records. provenance: of the one it read; report: as `recorded` makes it."""
        kinds = self.kinds_read(report)
        return provenance.after(self.name, self.record(), report, {self.reads_for: kinds} if kinds else {})

    def kinds_read(self, report: Mapping[str, Any]) -> tuple[str, ...]:
        """The kinds of text that it has read. report: as `recorded` makes it."""
        from retrofit.data.seen import kinds_read

        return kinds_read(self.texts)

    @abstractmethod
    def restored(self, stored: Mapping[str, Any]) -> Any:
        """Its report, from what `recorded` made of one."""

    @property
    def needs_tokens(self) -> bool:
        """Whether the tokenizer is needed."""
        return bool(self.texts)

    def also(self, context: ModelContext, inputs: Inputs) -> tuple[str, ...]:
        """What else it writes into a run folder, with digests."""
        return ()

    def unkept(self) -> tuple[str, ...]:
        """What else it writes into a run folder, without digests."""
        return ()

    def stale(self) -> tuple[str, ...]:
        """What it may have written for an earlier recipe, and does not for this one."""
        return ()
