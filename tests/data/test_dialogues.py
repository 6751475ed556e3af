"""Rows of dialogues: every form is read as one, and each malformed row is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retrofit.data import sources
from retrofit.data.dialogues import Dialogue
from retrofit.data.packing import training_rows
from retrofit.data.texts import check_sources, read_texts, unseen_held_out
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from tests.dialogues import WEATHER, says, small_talk, write_rows
from tests.tiny import tiny_tokenizer

GOOD = says("How tall is it?", "Two metres.")


def source(file: Path, **how: Any) -> TextSource:
    return TextSource(source=str(file), **how)


def dialogues(file: Path, **how: Any) -> list[Dialogue]:
    found = [text.dialogue for text in read_texts(source(file, **how), split="all")]
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def refused(file: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        check_sources([source(file)])
    return caught.value


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"conversations": [{"from": "human", "value": "How tall is it?"}, {"from": "gpt", "value": "Two metres."}]},
        {"conversations": GOOD["messages"]},
        {"prompt": "How tall is it?", "completion": "Two metres."},
        {"prompt": GOOD["messages"][:1], "completion": GOOD["messages"][1:]},
        {"text": GOOD["messages"]},
    ],
)
def test_every_form_is_one_dialogue(tmp_path: Path, row: dict[str, Any]) -> None:
    [found] = dialogues(write_rows(tmp_path / "a.jsonl", [row]))
    assert list(found.turns) == GOOD["messages"]
    assert found.transcript == "How tall is it?\n\nTwo metres."
    assert found.where.endswith("a.jsonl:1")


def test_a_field_names_the_key_of_the_turns(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"chat": GOOD["messages"], "text": "prose"}])
    [found] = dialogues(file, field="chat")
    assert list(found.turns) == GOOD["messages"]
    assert [text.dialogue for text in read_texts(source(file), split="all")] == [None]


def test_system_turns_tools_and_further_keys_survive(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather_at", "arguments": {"place": "Oslo"}}}
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather_at", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ]
    for number, tools in enumerate(([WEATHER], json.dumps([WEATHER]))):
        [found] = dialogues(write_rows(tmp_path / f"{number}.jsonl", [{"messages": turns, "tools": tools}]))
        assert found.tools == (WEATHER,)
        assert found.turns[2] == {"role": "assistant", "tool_calls": [call], "content": ""}
        assert found.turns[3]["name"] == "weather_at"
        assert found.turns[0]["content"] == "Be short."


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{"content": "hello"}, *GOOD["messages"]]}, "turn 1 has no role"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "turn 1 has the role `robot`"),
        (
            {"messages": [GOOD["messages"][0], {"role": "assistant", "content": " \n"}]},
            "turn 2, the assistant's, is empty",
        ),
        ({"messages": GOOD["messages"][:1]}, "the dialogue has no turn of the assistant"),
        ({"messages": []}, "the dialogue has no turn of the assistant"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "the content of turn 1 is list, not text"),
        ({"messages": [{"role": "user", "content": 7}]}, "the content of turn 1 is int, not text"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no content"),
        ({"messages": ["hello"]}, "turn 1 is str, not an object"),
        ({"messages": "hello"}, "`messages` holds str, not a list of turns"),
        ({"text": "hello"}, "no key `messages`; there are: text"),
        ({"messages": None}, "`messages` holds nothing"),
        ({**GOOD, "tools": "[{"}, "`tools` is text that is no JSON"),
        ({**GOOD, "tools": [1]}, "`tools` is no list of objects"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "`tool_calls` of turn 1 is no list"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "a lone surrogate"),
        ('{"messages": [', "not a JSON object"),
        ('{"messages": [' + '{"a":' * 700 + "1" + "}" * 700 + "]}", "nested too deeply"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "turn 1 has the role"),
        ({"conversations": [{"from": {}, "value": "a"}]}, "no key `messages`"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path: Path, row: object, what: str) -> None:
    error = refused(write_rows(tmp_path / "a.jsonl", [GOOD, GOOD, row, GOOD]))
    assert what in error.what
    assert error.where.endswith("a.jsonl:3")


def test_texts_and_dialogues_are_two_sources(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "b.txt").write_text("prose")
    assert "holds texts and dialogues" in refused(tmp_path).what


def test_a_parquet_file(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "weather_at"}}]}
    rows = [GOOD, {"messages": [GOOD["messages"][0], called], "tools": json.dumps([WEATHER])}]
    pq.write_table(pa.Table.from_pylist(rows, schema=None), tmp_path / "a.parquet")
    found = dialogues(tmp_path / "a.parquet")
    assert list(found[0].turns) == GOOD["messages"]  # without the keys that the table gave them
    pq.write_table(pa.Table.from_pylist([GOOD, {"messages": GOOD["messages"][:1]}]), tmp_path / "b.parquet")
    assert refused(tmp_path / "b.parquet").where.endswith("b.parquet, row 2")


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_hub_loader", lambda source: lambda *names, **how: [GOOD, {"messages": []}])
    monkeypatch.setattr(sources, "commit_of", lambda name: None)
    read = read_texts(TextSource(source="hub:a/b"), split="all")
    first = next(read)
    assert first.dialogue is not None
    with pytest.raises(UserError, match="no turn of the assistant") as caught:
        next(read)
    assert caught.value.where == "hub:a/b, row 2"


def test_the_example_is_dialogues() -> None:
    found = dialogues(Path(__file__).parents[2] / "examples" / "chat.jsonl")
    assert len(found) == 43
    assert {turn["role"] for one in found for turn in one.turns} == {"system", "user", "assistant", "tool"}


def test_what_a_source_holds(tmp_path: Path) -> None:
    assert sources.holds_dialogues(source(write_rows(tmp_path / "a.jsonl", [GOOD])))
    assert not sources.holds_dialogues(source(write_rows(tmp_path / "b.jsonl", [{"text": "a"}])))
    (tmp_path / "c.txt").write_text("prose")
    assert not sources.holds_dialogues(source(tmp_path / "c.txt"))
    assert not sources.holds_dialogues(TextSource(source="python-docs"))


def test_copies_are_known_by_what_is_said_whatever_the_form(tmp_path: Path) -> None:
    """The last tenth is held out; one of it stands in the training side in another form, with another system turn."""
    rows = small_talk(20)
    turns = rows[19]["messages"]
    copy = {"messages": [{"role": "system", "content": "Answer in numbers, and at length, please."}, *turns]}
    file = write_rows(tmp_path / "a.jsonl", [*rows[:3], copy, *rows[3:]])
    only, notes = unseen_held_out([source(file)], train_chars=10**6, held_out_chars=10**6)
    assert only["a.jsonl"] == {"a.jsonl:20"}
    assert "a.jsonl:21" in notes[0]


def test_calibration_reads_what_the_template_writes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=True)
    packed = training_rows(
        [source(write_rows(tmp_path / "a.jsonl", small_talk(20)))], tokenizer, 200, 50, 0, repeat=False
    )
    text = tokenizer.decode(packed.ids_NT[:, 1:].flatten())
    assert packed.counted_NT is None
    assert "<|im_start|>assistant\nNumber" in text
    assert "</s>" not in text
