"""What a report is made of: plain frozen data. Everything a run may lack is None or empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.evaluation.result import ModelEvaluation

if TYPE_CHECKING:
    from retrofit.context.extension import ExtendReport
    from retrofit.kernels.check import KernelCheck
    from retrofit.kv_heads.repair.outcome import ConvertReport
    from retrofit.publishing.gate import GateResult
    from retrofit.publishing.reload import ReloadReport


@dataclass(frozen=True)
class StepRecord:
    """One step of the run: seconds and peak memory as they were, and as the plan predicted them."""

    name: str
    seconds: float | None = None
    peak_bytes: int | None = None
    predicted_seconds: float | None = None
    predicted_peak_bytes: int | None = None


@dataclass(frozen=True)
class Training:
    """What a training was. best_step: whose weights were kept, 0 for the start. learning_rate: the highest of the
    schedule; tokens_per_second: the median of the steps. passages: the loss of passages out of the windows' sight,
    before and after, where it was measured."""

    loss: str
    steps: int
    best_step: int
    tokens: int
    rank: int
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    passages: tuple[float, float] | None = None


@dataclass(frozen=True)
class RunData:
    """Everything the report shows.

    training: (step, training loss or None, held-out loss or None). recovery: what that training was.
    windows: the fields of `windows.outcome.WindowReport` as JSON values.
    """

    name: str
    recipe_yaml: str = ""
    model: str = ""
    created: str = ""
    description: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    models: tuple[ModelEvaluation, ...] = ()
    native_length: int | None = None
    claimed_length: int | None = None
    training: tuple[tuple[int, float | None, float | None], ...] = ()
    recovery: Training | None = None
    steps: tuple[StepRecord, ...] = ()
    kernel: str | None = None
    kernel_proof: KernelCheck | None = None
    conversion: ConvertReport | None = None
    windows: Mapping[str, Any] | None = None
    context: ExtendReport | None = None
    gate: tuple[GateResult, ...] = ()
    reload: ReloadReport | None = None
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def original(self) -> ModelEvaluation | None:
        """The model before the run."""
        return next((model for model in self.models if model.label == "original"), None)

    @property
    def final(self) -> ModelEvaluation | None:
        """The last model that is not the original."""
        return next((model for model in reversed(self.models) if model.label != "original"), None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of text in the order measured, `all` last and only when there are several."""
        kinds = list(dict.fromkeys(row.kind for model in self.models for row in model.rows if row.kind != ALL))
        return tuple([*kinds, ALL] if len(kinds) != 1 and self._has_all else kinds)

    @property
    def seen(self) -> Mapping[str, tuple[str, ...]]:
        """By kind of text, what it was read for by the steps that made the final model."""
        shown = self.final or self.original
        return shown.seen if shown else {}

    @property
    def _has_all(self) -> bool:
        return any(row.kind == ALL for model in self.models for row in model.rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every context length measured."""
        return tuple(sorted({row.length for model in self.models for row in model.rows}))

    @property
    def longest(self) -> int | None:
        """The longest context length measured."""
        return self.lengths[-1] if self.lengths else None

    @property
    def head_length(self) -> int | None:
        """The length the headline compares at: the longest measured one that the original was made for."""
        inside = [length for length in self.lengths if self.native_length is None or length <= self.native_length]
        return max(inside, default=None)
