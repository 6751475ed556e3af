"""How often a training reads its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.recipe.schema import Recover
from retrofit.workflow.estimate.repetition import passes, passes_in_words, require_text, source_tokens


def recover(**values: Any) -> Recover:
    return Recover.model_validate(values)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("x" * 4_000_000)
    return str(tmp_path / "a.txt")


def test_a_file_has_a_token_in_four_bytes(text: str) -> None:
    found = recover(tokens=3_000_000, text=[{"source": text, "weight": 2}, "hub:some/data"])
    assert source_tokens(found.text[0]) == 1_000_000
    assert passes(found) == {text: pytest.approx(2.0)}
    assert passes_in_words(found).endswith("a.txt 2.0 times")
    require_text(found)


def test_more_than_four_passes_are_refused_unless_allowed(text: str) -> None:
    values = {"tokens": 5_000_000, "text": [text]}
    with pytest.raises(UserError, match=r"(?s)a.txt` about 5 times.*recover.text.*allow_repeats: true"):
        require_text(recover(**values))
    require_text(recover(**values, allow_repeats=True))


def test_a_short_training_is_refused_as_well(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("hi\n")  # not even the bytes of one token
    with pytest.raises(UserError, match="would read"):
        require_text(recover(tokens=2_048, text=[str(tmp_path / "few.txt")]))
    (tmp_path / "b.txt").write_text("x" * 4_000)
    with pytest.raises(UserError, match=r"about 10 times"):
        require_text(recover(tokens=10_000, text=[str(tmp_path / "b.txt")]))


def test_the_built_in_texts_are_too_small_for_a_long_training() -> None:
    with pytest.raises(UserError, match="read `python-docs` about"):
        require_text(recover(tokens=20_000_000))


@pytest.mark.parametrize("source", ["hub:some/data", "self", "missing.txt"])
def test_what_is_not_known_is_not_told(source: str) -> None:
    assert passes_in_words(recover(text=[source])) == ""
