"""What is known of a model's use of its context, as one record that comes back from JSON as it went. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.evaluation.metrics.effective import EffectiveLength
from retrofit.evaluation.metrics.longppl import ContextGain, LongPPL
from retrofit.evaluation.metrics.protocols import ProtocolResult

if TYPE_CHECKING:
    from retrofit.evaluation.tasks.needle import NeedleResult
    from retrofit.evaluation.tasks.ruler import RulerResult


@dataclass(frozen=True)
class LongContext:
    """How well a model uses its context. native: the length the original was made for. None or empty: not asked for.

    not_asked: lengths of needle and RULER tests that its window does not hold, and that it was therefore not asked at.
    """

    native: int
    context_gain: tuple[ContextGain, ...] = ()
    long_ppl: tuple[LongPPL, ...] = ()
    defined: tuple[ProtocolResult, ...] = ()
    needle: NeedleResult | None = None
    ruler: RulerResult | None = None
    effective: EffectiveLength | None = None
    notes: tuple[str, ...] = ()
    not_asked: tuple[int, ...] = ()


def restored(found: Mapping[str, Any]) -> LongContext:
    """A `LongContext` from what `console.jsonable` made of one. Raises pydantic.ValidationError for anything else."""
    from pydantic import TypeAdapter

    from retrofit.evaluation.tasks.needle import NeedleResult
    from retrofit.evaluation.tasks.ruler import RulerResult

    kinds: dict[str, Any] = {
        "native": int,
        "context_gain": tuple[ContextGain, ...],
        "long_ppl": tuple[LongPPL, ...],
        "defined": tuple[ProtocolResult, ...],
        "needle": NeedleResult | None,
        "ruler": RulerResult | None,
        "effective": EffectiveLength | None,
        "notes": tuple[str, ...],
        "not_asked": tuple[int, ...],
    }
    return LongContext(**{name: TypeAdapter(kind).validate_python(found[name]) for name, kind in kinds.items()})
