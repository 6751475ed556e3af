"""What the rules of the linter work on, and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from retrofit.checkpoint.config import is_number
from retrofit.context.fields import RopeView
from retrofit.escape import shown
from retrofit.model.families import KNOWN

LISTS = ("short_factor", "long_factor")
# Older names that transformers maps itself.
_ALIASES = {"su": "longrope", "mrope": "default"}


@dataclass(frozen=True)
class Finding:
    """severity: an error computes something else than meant; a warning does so in some engine or situation.

    where: the field. rule: a stable name for machines.
    """

    severity: Literal["error", "warning"]
    where: str
    what: str
    fix: str
    rule: str = ""


@dataclass(frozen=True)
class Facts:
    raw: Mapping[str, Any]
    views: tuple[RopeView, ...]
    window: object
    prefix: str = ""
    thetas: Mapping[str | None, float] = field(default_factory=dict)


def quoted(value: object) -> str:
    """A number as people write it; whatever else stands there as it is."""
    return f"{value:g}" if is_number(value) else shown(repr(value), 60)


def kind_of(facts: Facts, view: RopeView) -> str:
    """The rope type as transformers maps it: an older name, and that of vision models in their text part."""
    kind = view.rope_type
    if kind == "mrope" and facts.raw.get("model_type") in KNOWN:
        return kind
    return _ALIASES.get(kind, kind)
