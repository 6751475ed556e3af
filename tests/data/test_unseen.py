"""What was trained on is not measured, whatever it is called; what is fitted to and checked on stands there once."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from retrofit.data import texts as data
from retrofit.data.corpora import Text, built_in_texts
from retrofit.data.packing import spelled_tokens
from retrofit.data.texts import distinct_texts, evaluation_texts, unseen_held_out
from retrofit.data.unseen import Findings, without_repeats
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from tests.data.test_overlap import prose
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def source(name: object) -> TextSource:
    return TextSource(source=str(name))


def chosen(
    text: object, trained: object, *, count: int = 9, tokens: int = 200, also: tuple[object, ...] = ()
) -> tuple[list[str], list[str]]:
    """(names of what is measured, notes)."""
    findings = Findings()
    found = evaluation_texts(
        [source(text), *map(source, also)], count, tokens, TOKENIZER, trained_on=[source(trained)], findings=findings
    )
    return [name for name, _, _ in found], findings.notes


@pytest.fixture
def train(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    for index in range(10):
        (folder / f"{index}.txt").write_text(prose(index, 400))
    return folder


@pytest.fixture
def held(tmp_path: Path) -> Path:
    folder = tmp_path / "held"
    folder.mkdir()
    for index in range(3):
        (folder / f"new{index}.txt").write_text(prose(100 + index, 400))
    return folder


def test_disjoint_text_is_measured_as_it_was(train: Path, held: Path) -> None:
    assert chosen(held, train) == (["new0.txt", "new1.txt", "new2.txt"], [])
    assert chosen(held, train, count=2) == (["new0.txt", "new1.txt"], [])


@pytest.mark.parametrize("how", ["copy", "hard link", "rows", "excerpt", "inside", "edited", "capitals"])
def test_what_was_trained_on_is_left_out_and_told(train: Path, held: Path, how: str) -> None:
    original, copy = train / "3.txt", held / "a.txt"
    text = original.read_text()
    if how == "copy":
        shutil.copy(original, copy)
    elif how == "hard link":
        os.link(original, copy)
    elif how == "rows":
        copy = held / "a.jsonl"
        copy.write_text(json.dumps({"text": text}) + "\n")
    elif how == "excerpt":
        copy.write_text(text[300:1200])
    elif how == "inside":
        copy.write_text(text + prose(77, 300))
    elif how == "edited":
        generator = random.Random(0)
        copy.write_text(" ".join("other" if generator.random() < 0.05 else word for word in text.split()))
    else:
        copy.write_text(text.upper().replace(" ", "\n"))
    names, notes = chosen(held, train)
    assert names == ["new0.txt", "new1.txt", "new2.txt"]
    (note,) = notes
    assert "1 document was not measured" in note
    assert "in `train`" in note
    assert copy.name in note


def test_the_part_that_is_measured_decides_as_well(train: Path, held: Path) -> None:
    """A chapter was trained on, the book is measured from that chapter on."""
    (held / "a.txt").write_text((train / "0.txt").read_text()[:1000] + prose(78, 4000))
    assert "a.txt" not in chosen(held, train, tokens=500)[0]
    names, notes = chosen(held, train, tokens=3000, count=1)
    assert names == ["a.txt"]
    assert "parts of what is measured" in notes[0]
    assert "of a.txt in `train`" in notes[0]


def test_others_take_the_place_of_what_is_left_out(train: Path, held: Path) -> None:
    for index in range(9):
        shutil.copy(train / f"{index}.txt", held / f"copy{index}.txt")
    names, notes = chosen(held, train, count=2)
    assert names == ["new0.txt", "new1.txt"]
    assert "9 documents were not measured" in notes[0]
    assert "and 6 more" in notes[0]


def test_nothing_left_is_refused(train: Path, tmp_path: Path) -> None:
    shutil.copy(train / "0.txt", tmp_path / "test.txt")
    with pytest.raises(UserError, match=r"nothing is left to measure.*test.txt \(100% in `train`\)"):
        chosen(tmp_path / "test.txt", train)


def test_a_copy_in_the_held_out_part_of_its_own_source(tmp_path: Path) -> None:
    rows = [prose(index, 100) for index in range(20)]
    rows[18] = rows[2]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    names, notes = chosen(tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    assert names == ["a.jsonl:20"]
    assert "a.jsonl:19 (100% in `a.jsonl`)" in notes[0]


def test_a_document_is_measured_once(held: Path, tmp_path: Path) -> None:
    shutil.copy(held / "new0.txt", held / "z.txt")
    names, notes = chosen(held, "python-docs")
    assert names == ["new0.txt", "new1.txt", "new2.txt"]
    assert "z.txt of new0.txt" in notes[0]
    shutil.copy(held / "new1.txt", tmp_path / "again.txt")
    with pytest.raises(UserError, match=r"copy of one that is measured already \(new1.txt\)"):
        chosen(held, "python-docs", also=(tmp_path / "again.txt",))


def test_a_source_named_twice_is_measured_once(held: Path) -> None:
    names, notes = chosen(held, "python-docs", also=(held / ".." / "held",))
    assert names == ["new0.txt", "new1.txt", "new2.txt"]
    assert "3 documents were left out as copies" in notes[0]


def test_built_in_text_in_a_folder_is_the_same_text(tmp_path: Path) -> None:
    (held_out,) = built_in_texts("python-docs", "held_out")
    topics = sorted(built_in_texts("python-docs", "train"), key=lambda text: -len(text.text))[:2]
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text(topics[0].text)
    (folder / "b.txt").write_text(prose(5, 300))
    assert chosen(folder, "python-docs")[0] == ["b.txt"]
    (folder / "a.txt").write_text(held_out.text)
    assert chosen(folder, "python-docs")[0] == ["a.txt", "b.txt"], "the held-out side was not trained on"
    (tmp_path / "all.txt").write_text(held_out.text)
    with pytest.raises(UserError, match="nothing is left to measure"):
        chosen("python-docs", tmp_path / "all.txt")


def test_built_in_text_alone_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrofit.data.unseen.Overlap", lambda texts: pytest.fail("compared"))
    assert len(chosen("python-docs", "python-stdlib")[0]) == 1
    assert unseen_held_out([source("python-docs")], train_chars=9, held_out_chars=9) == ({}, ())
    assert distinct_texts([source("python-docs"), source("self")], limit_chars=lambda _: 9) == ({}, ())


def test_a_hub_dataset_is_compared_by_what_it_holds(train: Path, held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(train / f"{index}.txt").read_text() for index in range(3)]
    monkeypatch.setattr(
        "retrofit.data.sources._hub_loader", lambda source: lambda *_, **__: ({"text": row} for row in rows)
    )
    shutil.copy(train / "1.txt", held / "a.txt")
    names, notes = chosen(held, "hub:owner/name")
    assert "a.txt" not in names
    assert "in `owner-name`" in notes[0]


def test_what_is_held_out_of_training_stands_in_no_source(train: Path, tmp_path: Path) -> None:
    shutil.copy(train / "2.txt", train / "9.txt")
    only, notes = unseen_held_out([source(train)], train_chars=1 << 20, held_out_chars=1 << 20)
    assert only == {"train": frozenset()}
    assert "9.txt (100% in `train`)" in notes[0]
    (train / "9.txt").write_text(prose(9, 400))
    shutil.copy(train / "9.txt", tmp_path / "single.txt")
    both = [source(train), source(tmp_path / "single.txt")]
    only, notes = unseen_held_out(both, train_chars=1 << 20, held_out_chars=1 << 20)
    assert only == {"train": frozenset()}, "held out of one source, trained on in the other"
    assert unseen_held_out(both[:1], train_chars=1 << 20, held_out_chars=1 << 20) == (
        {"train": frozenset({"9.txt"})},
        (),
    )


def test_calibration_reads_nothing_twice(tmp_path: Path) -> None:
    book, other = prose(1, 2000), prose(2, 500)
    texts = {
        "a": [Text("part", "a", book[100:3000]), Text("other", "a", other)],
        "b": [Text("book", "b", book), Text("other", "b", other.upper())],
    }
    only, notes = without_repeats(texts)
    assert only == {"a": frozenset({"other"}), "b": frozenset({"book"})}
    assert len(notes) == 2
    assert "part" in notes[0]
    assert "`b`: 1 document was not read" in notes[1]
    with pytest.raises(UserError, match="all of it stands in other text") as caught:
        without_repeats({"b": texts["b"], "c": [Text("copy", "c", book)]})
    assert "`c`" in str(caught.value.where)


def test_special_tokens_that_a_text_spells_are_told() -> None:
    (note,) = spelled_tokens("a", ["words <s> and </s>, again </s>"], TOKENIZER)
    assert "</s> 2 times, <s> once" in note
    assert spelled_tokens("a", ["<b>plain</b>"], TOKENIZER) == []


def test_the_whole_of_a_hub_dataset_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_HUB_CHARS", 100)
    read = []

    def rows(*_: object, **__: object) -> object:
        for index in range(1000):
            read.append(index)
            yield {"text": "x" * 10}

    monkeypatch.setattr("retrofit.data.sources._hub_loader", lambda source: rows)
    (reading,) = data.readings_of([source("hub:owner/name")], 1 << 30)
    assert len(list(reading.texts())) == 10
    assert len(read) < 20
