"""Which measured kinds of text were read by the steps before, from their records, and which are unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrofit.data.seen import kinds_read, seen
from retrofit.recipe.schema import TextSource
from tests.dialogues import small_talk, write_rows


def record(step: str, *kinds: str) -> dict[str, Any]:
    return {"step": step, "config": {}, "read": list(kinds), "result": {}}


def test_kinds_of_a_source_are_its_name_its_prompts_and_chat(tmp_path: Path) -> None:
    talk = write_rows(tmp_path / "talk.jsonl", small_talk(3))
    (tmp_path / "a book.txt").write_text("Once upon a time.")
    own = {"source": "self", "prompts": [{"source": str(talk)}]}
    sources = [TextSource.model_validate(one) for one in ("python-docs", str(tmp_path / "a book.txt"), str(talk), own)]
    assert kinds_read(sources) == ("python-docs", "a-book.txt", "talk.jsonl", "chat", "self")


def test_each_kind_says_what_it_was_read_for_in_the_order_of_a_recipe() -> None:
    steps = [record("recover", "a", "b"), record("convert", "b"), record("extend", "c"), record("evaluate", "d")]
    assert seen("abcd", steps, {}) == {
        "a": ("training",),
        "b": ("calibration", "training"),
        "c": ("search",),
        "d": (),
    }


def test_a_kind_of_which_some_stands_in_text_that_was_read_is_seen() -> None:
    steps = [record("convert", "train"), record("recover", "other")]
    assert seen(["corpus", "new"], steps, {"corpus": {"train"}}) == {"corpus": ("calibration",), "new": ()}


def test_nothing_is_said_where_no_step_read_text() -> None:
    assert seen(["a"], [], {}) == {}
    assert seen(["a"], [record("convert"), {"step": "recover", "config": {}, "result": {}}], {}) == {}
