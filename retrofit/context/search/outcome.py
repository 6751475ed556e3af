"""What a search for a position encoding says about itself. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrofit.recipe.schema import RopeSettings


@dataclass(frozen=True)
class Trial:
    """One pass with one encoding. tokens: what it costs, those of a whole pass; native: loss of the first tokens, up to
    the original window; excess: how much more than before the extension, below 0 if less; tail: loss of the last
    tokens; needle: of the right answers; all in nats per token. objective: what is minimised."""

    rung: int
    label: str
    method: str
    settings: Mapping[str, Any]
    tokens: int
    native: float
    excess: float
    tail: float
    needle: float
    objective: float


@dataclass(frozen=True)
class SearchResult:
    """What a search chose. native: loss of the unextended model on what the last rung calls native.

    reference: YaRN's defaults, or the first published method the model can hold, in the last rung. read: tokens of the
    budget that the trials took, by the weights of their rungs; tokens_read: those that passes read, each counted once a
    pass, with the questions and the passes of the unextended model. text: what they read, and whether that was joined
    or repeated. baselines: as native, of every rung.
    """

    method: str
    settings: RopeSettings
    trials: tuple[Trial, ...]
    winner: Trial
    reference: Trial
    native: float
    read: int
    tokens_read: int
    text: str
    baselines: tuple[float, ...]
