"""What an evaluation found, typed: terminal, report, card, metrics.json and `--json` are views of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.evaluation.continuations import Continuation
from retrofit.evaluation.metrics.context_use import LongContext, restored
from retrofit.evaluation.metrics.effective import EffectiveLength, ShortContext
from retrofit.evaluation.metrics.frequency import FrequencyBand
from retrofit.evaluation.metrics.perplexity import Row
from retrofit.evaluation.tasks.answers import TaskChange, TaskScore

if TYPE_CHECKING:
    from retrofit.evaluation.running import RunCost
    from retrofit.kernels.check import KernelCheck

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelEvaluation:
    """One model.

    rows: perplexities by kind of text and length. kernel, dtype: what it was read with, and reason: why.
    kv_cache_dtype: what a serving engine stores keys and values as, "auto" as they are: it was read so, and is no
    property of the checkpoint. kv_bytes_per_token: what each of the first tokens adds to that KV cache. kv_cache_bytes:
    of one sequence, by tokens: the lengths that were measured, those that are always shown, and all positions.
    claimed_length: its positions. cost: of running it; None when it was not measured.
    position_losses: (position in tokens, mean loss in nats). long_context: whether the context is used, as far as that
    was asked for. short_context: what it lost against the original at or below the native length. by_frequency: the
    same by how frequent a token is. seen: by kind of text, what the steps that made the model have read other documents
    of it for (`calibration`, `search`, `training`), () for an unseen kind; empty where no step read text. tasks: scores
    of the tasks asked, task_changes: against the original, on the same questions. not_asked: by task, questions whose
    prompt its window does not hold.
    continuations: what it writes after a few prompts. losses: the file of its token losses.
    """

    label: str
    rows: tuple[Row, ...] = ()
    kernel: str = ""
    reason: str = ""
    dtype: str = ""
    kv_heads: int | None = None
    kv_cache_dtype: str = "auto"
    kv_bytes_per_token: int | None = None
    kv_cache_bytes: Mapping[int, int] = field(default_factory=dict)
    claimed_length: int | None = None
    cost: RunCost | None = None
    position_losses: tuple[tuple[float, float], ...] = ()
    long_context: LongContext | None = None
    short_context: tuple[ShortContext, ...] = ()
    by_frequency: tuple[FrequencyBand, ...] = ()
    seen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tasks: tuple[TaskScore, ...] = ()
    task_changes: tuple[TaskChange, ...] = ()
    not_asked: Mapping[str, int] = field(default_factory=dict)
    continuations: tuple[Continuation, ...] = ()
    losses: Path | None = None

    @property
    def effective(self) -> EffectiveLength | None:
        """The certificate of its effective length."""
        return self.long_context.effective if self.long_context else None

    def row(self, kind: str, length: int) -> Row | None:
        """The row of one kind at one length."""
        return next((row for row in self.rows if (row.kind, row.length) == (kind, length)), None)


@dataclass(frozen=True)
class EvaluationResult:
    """Every model of a run, the original first. metrics: of the last against the first, as `require` names them. proof:
    of the kernel that the last one is read with."""

    models: tuple[ModelEvaluation, ...]
    metrics: Mapping[str, float]
    proof: KernelCheck
    schema_version: int = SCHEMA_VERSION

    def of(self, label: str) -> ModelEvaluation:
        """The model of that label."""
        return next(model for model in self.models if model.label == label)

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> EvaluationResult:
        """From what `console.jsonable` made of one. Raises pydantic.ValidationError, KeyError or TypeError for anything
        else."""
        from pydantic import TypeAdapter

        from retrofit.evaluation.running import RunCost
        from retrofit.kernels.check import KernelCheck

        kinds: dict[str, Any] = {
            "rows": tuple[Row, ...],
            "kv_cache_bytes": dict[int, int],
            "cost": RunCost | None,
            "position_losses": tuple[tuple[float, float], ...],
            "short_context": tuple[ShortContext, ...],
            "by_frequency": tuple[FrequencyBand, ...],
            "seen": dict[str, tuple[str, ...]],
            "tasks": tuple[TaskScore, ...],
            "task_changes": tuple[TaskChange, ...],
            "not_asked": dict[str, int],
            "continuations": tuple[Continuation, ...],
            "losses": Path | None,
        }
        models = []
        for values in stored["models"]:
            typed = {name: TypeAdapter(kind).validate_python(values[name]) for name, kind in kinds.items()}
            context = values["long_context"]
            typed["long_context"] = None if context is None else restored(context)
            models.append(ModelEvaluation(**{**values, **typed}))
        metrics = TypeAdapter(dict[str, float]).validate_python(stored["metrics"])
        proof = TypeAdapter(KernelCheck).validate_python(stored["proof"])
        return cls(tuple(models), metrics, proof, int(stored["schema_version"]))
