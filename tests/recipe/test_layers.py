"""Which layers are meant, however it is written."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from retrofit.recipe.layers import how_many
from retrofit.recipe.schema import Window


@pytest.mark.parametrize(
    ("written", "meant", "of_thirty"),
    [
        ("auto", "auto", None),
        (8, 8, 8),
        ("8", 8, 8),
        (0, 0, 0),
        ("1/4", "1/4", 8),
        (" 1/64 ", "1/64", 1),
        ("7,17", (7, 17), 2),
        ("17, 7,7", (7, 17), 2),
        ("8,", (8,), 1),
        ([3, 1], (1, 3), 2),
        ([], (), 0),
    ],
)
def test_layers_are_named_in_many_ways(written: Any, meant: Any, of_thirty: int | None) -> None:
    section = Window(full_layers=written)
    assert section.full_layers == meant
    assert how_many(section.full_layers, 30) == of_thirty
    assert Window.model_validate(section.model_dump(mode="json")) == section


@pytest.mark.parametrize("written", ["some", "5/4", "1/0", -1, 1.5, None, [True], ["1"], "1,-2", ",", 70_000, "1/4,2"])
def test_what_names_no_layers_is_told_with_what_does(written: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Window(full_layers=written)
    [problem] = caught.value.errors()
    assert "layers" in problem["msg"] or "true or false" in problem["msg"]
