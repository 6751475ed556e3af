"""Which needle and RULER tests a model is asked: those that its window holds."""

from __future__ import annotations

from retrofit.evaluation.tasks.ruler import Row, RulerResult
from retrofit.evaluation.tasks.within import not_asked, within_window
from retrofit.recipe.schema import Evaluate

SECTION = Evaluate.model_validate({"needle": {"lengths": [512, 1024]}, "ruler": {"lengths": [256, 1024]}})


def test_a_window_that_holds_every_length_changes_nothing() -> None:
    assert within_window(SECTION, 1024) is SECTION


def test_longer_lengths_are_left_out() -> None:
    found = within_window(SECTION, 512)
    assert found.needle is not None
    assert found.needle.lengths == (512,)
    assert found.ruler is not None
    assert found.ruler.lengths == (256,)


def test_a_test_without_a_length_that_fits_is_left_out() -> None:
    found = within_window(SECTION, 300)
    assert found.needle is None
    assert found.ruler is not None
    assert found.lengths == SECTION.lengths


def test_what_was_not_asked_is_known_from_the_answers() -> None:
    ruler = RulerResult((Row("niah_single", 256, 1, 1.0, 0.1, 1.0, 1.0, 1.0),), (), 1, 0, "blockwise")
    assert not_asked(SECTION, None, ruler) == (512, 1024)
    assert not_asked(Evaluate(), None, None) == ()
