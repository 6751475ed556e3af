"""Text: both sides of every split, near-duplicates, user files, and what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError

from retrofit.console import Silent
from retrofit.data import corpora, sources
from retrofit.data.corpora import (
    docs_held_out,
    docs_texts,
    groups,
    lines,
    stdlib_held_out,
    stdlib_texts,
    without_excerpts,
)
from retrofit.data.packing import training_rows
from retrofit.data.texts import check_sources, evaluation_texts, read_texts
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def source(name: object, **over: object) -> TextSource:
    return TextSource.model_validate({"source": str(name), **over})


def names(name: object, split: corpora.Split) -> list[str]:
    return [text.name for text in read_texts(source(name), split=split)]


@pytest.fixture(scope="module")
def stdlib() -> dict[str, str]:
    return stdlib_texts()


# ------------------------------------------------------------------------------------------- built-in corpora


def shingles(text: str, words: int = 10) -> set[tuple[str, ...]]:
    """Runs of `words` words: another measure of overlap than the one that made the groups."""
    split = text.split()
    return {tuple(split[i : i + words]) for i in range(max(1, len(split) - words + 1))}


def test_docs_are_split_without_near_duplicates_across_the_sides() -> None:
    texts = docs_texts()
    held_out = docs_held_out(texts)
    total = sum(map(len, texts.values()))
    assert 0.25 < sum(len(texts[name]) for name in held_out) / total < 0.4
    sides = [[shingles(text) for name, text in texts.items() if (name in held_out) == side] for side in (True, False)]
    worst = max(len(a & b) / min(len(a), len(b)) for a in sides[0] for b in sides[1])
    assert worst < 0.2, worst


def test_excerpts_of_a_longer_topic_are_left_out() -> None:
    texts = docs_texts()
    assert "specialnames" in texts
    assert "customization" not in texts  # every line of it stands in specialnames
    assert "compound" in texts
    assert "while" not in texts
    long = "\n".join(f"line number {i} of a long document, with some words" for i in range(50))
    kept = without_excerpts(
        {"long": long, "part": long[500:1500], "other": "a text of its own, on one long line"}, lines
    )
    assert set(kept) == {"long", "other"}


def test_texts_that_share_lines_are_one_group() -> None:
    rows = [f"this is line number {i}, long enough to count" for i in range(40)]
    texts = {"a": "\n".join(rows[:20]), "b": "\n".join(rows[14:34]), "c": "\n".join(rows[34:])}
    assert sorted(groups(texts, lines)) == [("a", "b"), ("c",)]


def test_held_out_docs_are_one_long_document() -> None:
    (document,) = read_texts(source("python-docs"), split="held_out")
    assert len(document.text) > 100_000
    assert "joined" in document.name
    train = list(read_texts(source("python-docs"), split="train"))
    assert len(train) > 20
    assert all(text.text not in document.text for text in train)


def test_stdlib_holds_out_whole_files_long_ones_among_them(stdlib: dict[str, str]) -> None:
    held_out = stdlib_held_out(stdlib)
    assert 0.05 < sum(len(stdlib[name]) for name in held_out) / sum(map(len, stdlib.values())) < 0.25
    long = [name for name in stdlib if len(stdlib[name]) > 80_000]
    assert 3 <= len(held_out.intersection(long)) <= len(long) / 2
    assert not any("test" in Path(name).parts or name.startswith("_sysconfigdata") for name in stdlib)
    for group in groups(stdlib, lines):
        assert len({name in held_out for name in group}) == 1, group


def test_the_split_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from retrofit.data.corpora import *\n"
        "print(sorted(stdlib_held_out(stdlib_texts())), groups(docs_texts(), phrases))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------- user text


def test_the_last_tenth_of_user_text_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n\n" for i in range(20)))
    read = [
        [text.text for text in read_texts(source(file, field="body"), split=split)]
        for split in ("train", "held_out", "all")
    ]
    assert read[0] == [f"text {i}" for i in range(18)]
    assert read[1] == ["text 18", "text 19"]
    assert read[2] == read[0] + read[1]


def test_a_single_document_is_never_on_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("only one document")
    assert names(file, "train") == ["one.txt"]
    assert names(file, "held_out") == []
    with pytest.raises(UserError, match="used for training only"):
        training_rows([source(file)], TOKENIZER, 32, 16, seed=0, split="held_out")
    progress = Silent()
    mixed = training_rows(
        [source(file), source("python-docs")], TOKENIZER, 32, 16, seed=0, split="held_out", progress=progress
    ).ids_NT
    assert mixed.shape == (2, 16)
    assert any("used for training only" in note for note in progress.notes)


def test_folders_and_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["p one", None, "p two"]}), folder / "b.parquet")
    (folder / "a.txt").write_text("a text")
    (folder / "deep/c.md").write_text("more")
    (folder / "image.png").write_bytes(b"\x00")
    texts = list(read_texts(source(folder), split="all"))
    assert [text.text for text in texts] == ["a text", "p one", "p two", "more"]
    assert {text.kind for text in texts} == {"corpus"}
    with pytest.raises(UserError, match="no key `body`; there are: text"):
        list(read_texts(source(folder / "b.parquet", field="body"), split="all"))
    (folder / "broken.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="parquet"):
        list(read_texts(source(folder / "broken.parquet"), split="all"))


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', "no key `text`; there are: body", "bad.jsonl:2"),
        ('{"text": "a"}\nnot json\n', "not a JSON object", "bad.jsonl:2"),
        ('{"text": 3}\n', "holds int, not text", "bad.jsonl:1"),
        ("[1]\n", "must be a JSON object", "bad.jsonl:1"),
        ("\n \n", "the text is empty", "bad.jsonl"),
        ('{"text": "  "}\n', "the text is empty", "bad.jsonl"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, what: str, where: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=what) as caught:
        list(read_texts(source(tmp_path / "bad.jsonl"), split="all"))
    assert where in str(caught.value.where)
    assert caught.value.fix


def test_bad_files_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("\xe9t\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "nothing").mkdir()
    for name, what in {
        "latin.txt": "not UTF-8",
        "empty.txt": "the text is empty",
        "rows.json": r"\.json file",
        "nothing": "the folder holds no text",
        "missing.txt": "no such text file",
    }.items():
        with pytest.raises(UserError, match=what):
            check_sources([source("python-docs"), source(tmp_path / name)])
    with pytest.raises(UserError) as caught:
        check_sources([source("python-doc")])
    assert caught.value.fix == "did you mean `python-docs`?"


def test_files_are_checked_to_their_end(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    (folder / "b.txt").write_bytes("\xe9t\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        check_sources([source(folder)])
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "a"}\n' * 4999 + "not json\n")
    with pytest.raises(UserError, match="not a JSON object") as caught:
        check_sources([source(lines)])
    assert str(caught.value.where).endswith("rows.jsonl:5000")


def test_optional_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("hub:some/dataset", tmp_path / "a.parquet"):
        with pytest.raises(UserError) as caught:
            check_sources([source(name)])
        assert str(caught.value.fix).startswith("pip install")


def test_hub_datasets_are_streamed_and_every_tenth_row_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        calls.append((name, config, split, streaming))
        return ({"text": f"row {i}"} for i in range(1, 31))

    monkeypatch.setattr(sources, "_hub_loader", lambda source: load_dataset)
    read = list(read_texts(source("hub:owner/name:config", split="validation"), split="held_out"))
    assert [text.text for text in read] == ["row 10", "row 20", "row 30"]
    assert read[0].kind == "owner-name-config"
    assert calls[0] == ("owner/name", "config", "validation", True)
    limited = list(read_texts(source("hub:owner/name"), split="train", limit_chars=12))
    assert len(limited) == 3


@pytest.mark.parametrize("error", [ConnectionError("the connection was lost"), HTTPError("timed out"), OSError()])
def test_a_hub_stream_that_breaks_off_is_told_and_a_check_reads_one_row(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_dataset(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "row 1"}
        raise error

    monkeypatch.setattr(sources, "_hub_loader", lambda source: load_dataset)
    check_sources([source("hub:owner/name")])
    with pytest.raises(UserError, match="cannot read the dataset") as caught:
        list(read_texts(source("hub:owner/name"), split="all"))
    assert "hub:owner/name" in str(caught.value.where)
    assert "network" in str(caught.value.fix)


def test_a_disk_that_fills_while_a_dataset_streams_is_no_fault_of_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "_hub_loader", lambda source: load_dataset)
    with pytest.raises(UserError, match="disk is full"):
        list(read_texts(source("hub:owner/name"), split="all"))


# ------------------------------------------------------------------------------------------- evaluation and samples


def test_evaluation_documents_are_long_enough_and_held_out(tmp_path: Path) -> None:
    mix = [source("python-docs"), source("python-stdlib")]
    chosen = evaluation_texts(mix, 2, 50_000, TOKENIZER)
    assert [kind for _, kind, _ in chosen] == ["python-docs", "python-stdlib", "python-stdlib"]
    assert all(len(TOKENIZER(text)["input_ids"]) >= 50_000 for _, _, text in chosen)
    trained = {text.name for text in read_texts(mix[1], split="train")}
    assert not trained.intersection(name for name, _, _ in chosen)
    (tmp_path / "mine.txt").write_text("x" * 99)
    assert evaluation_texts([source(tmp_path / "mine.txt")], 2, 100, TOKENIZER)[0][0] == "mine.txt"
    with pytest.raises(UserError, match="no document is 101 tokens long; the longest has 100"):
        evaluation_texts([source(tmp_path / "mine.txt")], 2, 101, TOKENIZER)
    with pytest.raises(UserError, match="no document of it is held out"):
        evaluation_texts([source(tmp_path / "mine.txt")], 2, 10, TOKENIZER, trained_on=[source(tmp_path / "mine.txt")])


def test_text_that_was_trained_on_under_another_path_is_not_measured(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"{number} " * 40)
    (tmp_path / "link").symlink_to(folder)

    def names(text: Path, trained: str) -> list[str]:
        found = evaluation_texts([source(text)], 9, 10, TOKENIZER, trained_on=[source(trained)])
        return [name for name, _, _ in found]

    assert names(folder, "python-docs") == ["0.txt", "1.txt", "2.txt"]
    assert names(tmp_path / "link", str(folder)) == ["2.txt"]
    for text, trained in (
        (folder / "0.txt", folder),
        (folder, folder / "0.txt"),
        (folder / "0.txt", tmp_path / "link"),
    ):
        with pytest.raises(UserError, match="hold the same documents"):
            names(text, str(trained))
