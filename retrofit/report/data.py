"""What a report is made of: plain frozen data. Everything a run may lack is None or empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retrofit.evaluation.metrics.perplexity import ALL, Row

if TYPE_CHECKING:
    from retrofit.evaluation.continuations import Continuation
    from retrofit.evaluation.metrics.context_use import LongContext
    from retrofit.evaluation.metrics.effective import EffectiveLength, ShortContext
    from retrofit.evaluation.running import RunCost
    from retrofit.evaluation.tasks.answers import TaskChange, TaskScore

CACHE_LENGTHS = (8192, 16384, 32768, 131072)
"""Tokens at which the KV cache is shown: keys of `ModelResult.kv_cache_bytes`."""


@dataclass(frozen=True)
class ModelResult:
    """One model of the run: `original`, `converted`, `extended`, `recovered`, in the order they were made.

    rows: perplexities by kind and length. position_losses: (position in tokens, mean loss in nats). kv_cache_bytes:
    bytes of the KV cache by number of tokens. cost: of running it, by length. long_context: how it uses its context, as
    far as that was asked for. short_context: what it lost against the original at or below the native length.
    tasks: scores of the tasks asked; task_changes: against the original, on the same questions. continuations: what it
    writes after a few prompts.
    """

    label: str
    rows: tuple[Row, ...] = ()
    position_losses: tuple[tuple[float, float], ...] = ()
    kv_bytes_per_token: int | None = None
    kv_cache_bytes: Mapping[int, int] = field(default_factory=dict)
    kv_heads: int | None = None
    cost: RunCost | None = None
    long_context: LongContext | None = None
    short_context: tuple[ShortContext, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    task_changes: tuple[TaskChange, ...] = ()
    continuations: tuple[Continuation, ...] = ()

    @property
    def effective(self) -> EffectiveLength | None:
        """The certificate of its effective length."""
        return self.long_context.effective if self.long_context else None

    def row(self, kind: str, length: int) -> Row | None:
        """The row of one kind at one length."""
        return next((row for row in self.rows if (row.kind, row.length) == (kind, length)), None)


@dataclass(frozen=True)
class StepRecord:
    """One step of the run: seconds and peak memory as they were, and as the plan predicted them."""

    name: str
    seconds: float | None = None
    peak_bytes: int | None = None
    predicted_seconds: float | None = None
    predicted_peak_bytes: int | None = None


@dataclass(frozen=True)
class RunData:
    """Everything the report shows.

    training: (step, training loss or None, held-out loss or None). recovery: of the training, `loss`, `steps`,
    `tokens`, `tokens_per_second`, `rank` and `learning_rate`. kernel_proof: the fields of
    `kernels.registry.Proof`; conversion: of `kv_heads.convert.ConvertReport`; context: of `context.rope.Extension`, and
    under `search`, where the encoding was searched for, of `context.search.Found`; reload: of
    `publish.reload.ReloadReport`. gate: one dict per requirement (metric, bound, value, passed, reason).
    """

    name: str
    recipe_yaml: str = ""
    model: str = ""
    created: str = ""
    description: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    models: tuple[ModelResult, ...] = ()
    native_length: int | None = None
    claimed_length: int | None = None
    training: tuple[tuple[int, float | None, float | None], ...] = ()
    recovery: Mapping[str, Any] | None = None
    steps: tuple[StepRecord, ...] = ()
    kernel: str | None = None
    kernel_proof: Mapping[str, Any] | None = None
    conversion: Mapping[str, Any] | None = None
    context: Mapping[str, Any] | None = None
    gate: tuple[Mapping[str, Any], ...] = ()
    reload: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def original(self) -> ModelResult | None:
        """The model before the run."""
        return next((model for model in self.models if model.label == "original"), None)

    @property
    def final(self) -> ModelResult | None:
        """The last model that is not the original."""
        return next((model for model in reversed(self.models) if model.label != "original"), None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of text in the order measured, `all` last and only when there are several."""
        kinds = list(dict.fromkeys(row.kind for model in self.models for row in model.rows if row.kind != ALL))
        return tuple([*kinds, ALL] if len(kinds) != 1 and self._has_all else kinds)

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
