"""Which measured kinds of text were read by the steps before, from their records, and which are unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from retrofit.data.corpora import built_in_texts
from retrofit.data.prompts import first_lines
from retrofit.data.seen import kinds_read, seen
from retrofit.recipe.load import load_recipe
from retrofit.recipe.schema import Evaluate, Recipe, TextSource
from tests.dialogues import small_talk, write_rows


def record(purpose: str, *kinds: str) -> dict[str, Any]:
    return {"step": "any", "config": {}, "read": {purpose: list(kinds)} if kinds else {}, "result": {}}


def test_kinds_of_a_source_are_its_name_its_prompts_and_chat(tmp_path: Path) -> None:
    talk = write_rows(tmp_path / "talk.jsonl", small_talk(3))
    (tmp_path / "a book.txt").write_text("Once upon a time.")
    own = {"source": "self", "prompts": [{"source": str(talk)}]}
    sources = [TextSource.model_validate(one) for one in ("python-docs", str(tmp_path / "a book.txt"), str(talk), own)]
    made = kinds_read([TextSource(source="synthetic")])
    assert made == ("synthetic", "python-docs", "python-stdlib"), "its answers stand in these"
    assert kinds_read(sources) == ("python-docs", "a-book.txt", "talk.jsonl", "chat", "self")


def test_each_kind_says_what_it_was_read_for_in_the_order_of_a_recipe() -> None:
    steps = [record("training", "a", "b"), record("calibration", "b"), record("search", "c"), record("other", "d")]
    assert seen("abcd", steps, {}) == {
        "a": ("training",),
        "b": ("calibration", "training"),
        "c": ("search",),
        "d": (),
    }


def test_a_kind_of_which_some_stands_in_text_that_was_read_is_seen() -> None:
    steps = [record("calibration", "train"), record("training", "other")]
    assert seen(["corpus", "new"], steps, {"corpus": {"train"}}) == {"corpus": ("calibration",), "new": ()}


def test_nothing_is_said_where_no_step_read_text() -> None:
    assert seen(["a"], [], {}) == {}
    assert seen(["a"], [record("calibration"), {"step": "recover", "config": {}, "result": {}}], {}) == {}


def test_short_prose_is_long_enough_to_measure_and_can_only_be_measured() -> None:
    assert list(built_in_texts("short-prose", "train")) == []
    (text,) = built_in_texts("short-prose", "held_out")
    assert text.kind == "short-prose"
    assert len(text.text) > 4.2 * 4096  # characters: of a token of SmolLM2's, 4.2
    assert Evaluate.model_validate({"text": ["short-prose"]}).text[0].source == "short-prose"
    own = {"source": "self", "prompts": ["short-prose"]}
    for refused in (
        {"recover": {"text": ["short-prose"]}},
        {"convert": {"kv_heads": 1, "calibration": {"text": [own]}}},
    ):
        with pytest.raises(ValidationError, match=r"only `evaluate\.text` may name it"):
            Recipe.model_validate({"name": "x", **refused})


def test_openings_are_first_lines_of_their_own_side_and_no_text() -> None:
    train, held_out = ({text.text for text in built_in_texts("openings", side)} for side in ("train", "held_out"))
    assert len(train) > 100
    assert len(held_out) > 30
    assert not train & held_out
    every = [text.text for text in built_in_texts("openings", "all")]
    assert len(every) == len(train) + len(held_out)
    assert [line for text in every for line in first_lines(text)] == every  # none is too short or cut
    for refused in ({"recover": {"text": ["openings"]}}, {"evaluate": {"text": ["openings"]}}):
        with pytest.raises(ValidationError, match=r"only `prompts` of the source `self` may name them"):
            Recipe.model_validate({"name": "x", **refused})


@pytest.mark.parametrize("name", ["quickstart", "gqa", "mqa", "chat-gqa"])
def test_recipes_at_short_lengths_measure_a_kind_that_no_step_reads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.evaluate is not None
    assert "short-prose" in {source.source for source in recipe.evaluate.text}
