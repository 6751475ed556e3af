"""What a conversion says about itself. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RepairOutcome:
    """What one repair did in one layer.

    accepted: whether its weights were kept. held_out_before/after: error of the attention output on text the repair
    was not fitted on, as a share of the target's energy.
    """

    name: str
    accepted: bool
    held_out_before: float
    held_out_after: float


@dataclass(frozen=True)
class LayerReport:
    """What conversion did to one layer.

    keys, values: share of the scores' and of the attention output's energy that the merge gives up, 0 to 1 (None
    where it was not computed). keys_fitted: with a norm on keys, whether fitted keys were kept (else mean-pooled ones).
    repairs: in the order they were tried.
    """

    index: int
    groups: tuple[tuple[int, ...], ...]
    keys: float | None = None
    keys_fitted: bool | None = None
    values: float | None = None
    repairs: tuple[RepairOutcome, ...] = ()

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> LayerReport:
        """The report that was stored as JSON values."""
        groups = tuple(tuple(group) for group in stored["groups"])
        repairs = tuple(RepairOutcome(**repair) for repair in stored["repairs"])
        return cls(**{**stored, "groups": groups, "repairs": repairs})


@dataclass(frozen=True)
class ConvertReport:
    """What conversion did. tokens: of calibration, and of each kind of text. notes: everything that was not done as
    asked, and why."""

    method: str
    kv_heads_before: int
    kv_heads_after: int
    layers: tuple[LayerReport, ...]
    tokens: int
    kinds: tuple[str, ...]
    tokens_by_kind: Mapping[str, int]
    seconds: float
    notes: tuple[str, ...] = ()
