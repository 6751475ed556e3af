"""What was measured of windows, and what a conversion says about itself. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retrofit.kv_heads.repair.outcome import RepairOutcome


@dataclass(frozen=True)
class Rise:
    """What the loss rises by, in nats per token: of text whose window holds everything (near), of text that it does not
    (far), and of what lies outside of the window: passages that come again (answers), numbers that are asked for
    (needles), tokens that need the far context (keys); None where that is not measured."""

    near: float
    far: float
    answers: float
    needles: float | None = None
    keys: float | None = None

    def __sub__(self, other: Rise) -> Rise:
        return Rise(
            self.near - other.near,
            self.far - other.far,
            self.answers - other.answers,
            _less(self.needles, other.needles),
            _less(self.keys, other.keys),
        )


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


@dataclass(frozen=True)
class Limits:
    """What the window of one layer may add, in nats per token: to far text, and to answers."""

    text: float
    answers: float

    def score(self, added: Rise) -> float:
        """What a layer's window adds, in limits; from 1 on it sees everything, where nobody says how many layers do."""
        return max(0.0, added.far) / self.text + max(0.0, added.answers) / self.answers


@dataclass(frozen=True)
class Round:
    """What was measured. windowed: layers with windows, rise: beyond the original's loss. added: what the window of one
    more layer adds to that, or of one of these layers has added."""

    windowed: tuple[int, ...]
    rise: Rise
    added: Mapping[int, Rise]


@dataclass(frozen=True)
class Choice:
    """full: layers that see everything. rise: of the loss, measured, with windows in all others. rounds: in order.
    ranking: all layers that could be chosen, those that need most to see everything first. tokens: that every part of a
    `Rise` is a mean over."""

    full: tuple[int, ...]
    rise: Rise
    rounds: tuple[Round, ...]
    ranking: tuple[int, ...] = field(default=())
    tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowLayerReport:
    """What was done to one layer.

    window: tokens it sees now, None for all. sinks: query heads with a sink. mass: what the softmax puts outside of the
    window, a mean over heads and tokens. bare, lost: share of the output's energy that is lost without and with sinks.
    repairs: what became of those that were tried.
    """

    index: int
    window: int | None
    sinks: int = 0
    mass: float = 0.0
    bare: float = 0.0
    lost: float = 0.0
    repairs: tuple[RepairOutcome, ...] = ()

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> WindowLayerReport:
        """The report that was stored as JSON values."""
        return cls(**{**stored, "repairs": tuple(RepairOutcome(**repair) for repair in stored["repairs"])})


@dataclass(frozen=True)
class WindowReport:
    """What was done. target: the architecture written. full_layers: those that see everything. rise: of the loss on
    text that nothing was fitted on, in nats per token, before any training. choice: how the layers were found, None
    where they were named. tokens: of the text that was fitted on, and of each kind; measured_tokens: of the other.
    seconds: that it took; 0 in a checkpoint's record, which keeps no times. notes: everything that was not done as
    asked, and why."""

    target: str
    size: int
    full_layers: tuple[int, ...]
    rise: Rise
    layers: tuple[WindowLayerReport, ...]
    choice: Choice | None
    tokens: int
    tokens_by_kind: Mapping[str, int]
    measured_tokens: int
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
