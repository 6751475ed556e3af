"""Which tests of a long context a model is asked: those whose texts its window holds.

A recipe asks its tests at the lengths of the result. The original, whose window is shorter, is asked those that fit it
and marked as not asked the others: what it answers to a text that it cannot read says nothing of the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrofit.recipe.schema import Evaluate

if TYPE_CHECKING:
    from retrofit.evaluation.tasks.needle import NeedleResult
    from retrofit.evaluation.tasks.ruler import RulerResult


def within_window(section: Evaluate, positions: int) -> Evaluate:
    """The section with the lengths of needle and RULER tests that `positions` hold; a test without any is left out."""
    changed = {}
    for name in ("needle", "ruler"):
        test = getattr(section, name)
        if test is not None and max(test.lengths) > positions:
            held = tuple(length for length in test.lengths if length <= positions)
            changed[name] = test.model_copy(update={"lengths": held}) if held else None
    return section.model_copy(update=changed) if changed else section


def not_asked(section: Evaluate, needle: NeedleResult | None, ruler: RulerResult | None) -> tuple[int, ...]:
    """Lengths at which `section` asks needle or RULER tests and these results hold no answer, in order."""
    missing: set[int] = set()
    if section.needle is not None:
        missing |= set(section.needle.lengths) - set(needle.lengths if needle else ())
    if section.ruler is not None:
        missing |= set(section.ruler.lengths) - {row.length for row in (ruler.rows if ruler else ())}
    return tuple(sorted(missing))
