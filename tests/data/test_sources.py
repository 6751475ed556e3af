"""Text files as people have them: suffixes, encodings, compression, broken rows, and what a folder can hold."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from pathlib import Path

import pytest

from retrofit.data import folders, readers
from retrofit.data.sources import kind_of
from retrofit.data.texts import check_sources, read_texts
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource

TEXT = "Le c\u00f4t\u00e9 du fleuve.\nA second line \U0001f30a.\n"
ROWS = "".join(json.dumps({"text": f"row {index} {TEXT}"}) + "\n" for index in range(3))


def read(path: Path) -> list[str]:
    return [text.text for text in read_texts(TextSource(source=str(path)), split="all")]


def names(path: Path) -> list[str]:
    return [text.name for text in read_texts(TextSource(source=str(path)), split="all")]


def refusal(path: object) -> UserError:
    with pytest.raises(UserError) as caught:
        check_sources([TextSource(source=str(path))])
    assert "\n" not in caught.value.what
    assert len(str(caught.value)) < 1000
    return caught.value


@pytest.mark.parametrize("name", ["a.TXT", "a.text", "a.Md", "a", "a.rst", "a.py", "a.txt.gz", "A.TXT.GZ", "a.gz"])
def test_prose(tmp_path: Path, name: str) -> None:
    data = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert read(tmp_path / name) == [TEXT]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.NDJSON.gz", "a.jsonl.gz", "a", "a.gz"])
def test_rows(tmp_path: Path, name: str) -> None:
    data = ROWS.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert read(tmp_path / name) == [json.loads(line)["text"] for line in ROWS.splitlines()]
    assert names(tmp_path / name) == [f"{name}:{number}" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    "name", ["a.pdf", "a.docx", "a.bin", "a.zip", "a.PNG", "a.csv", "a.json", "a.html", "a.parquet.gz"]
)
def test_other_kinds_are_not_prose(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TEXT)
    assert "not read as text" in refusal(tmp_path / name).what


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_encodings_with_a_mark_and_every_line_end(tmp_path: Path, encoding: str, mark: bytes, ends: str) -> None:
    (tmp_path / "a.txt").write_bytes(mark + TEXT.replace("\n", ends).encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(mark + ROWS.replace("\n", ends).encode(encoding))
    assert read(tmp_path / "a.txt") == [TEXT]
    assert read(tmp_path / "b.jsonl") == [json.loads(line)["text"] for line in ROWS.splitlines()]


def test_lines_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    long = [f"{index} " + "word " * 300_000 for index in range(3)]
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in long), encoding=encoding
        )
        assert read(tmp_path / "a.jsonl") == long


def test_a_long_line_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is added to, no part of it is searched for its end again."""
    searched = []
    cut = readers._cut

    def counted(data: bytearray, newline: bytes, start: int) -> bytes:
        searched.append(len(data) - start)
        return cut(data, newline, start)

    monkeypatch.setattr(readers, "_cut", counted)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 2_000_000}))
    assert len(read(tmp_path / "a.jsonl")[0]) == 10_000_000
    assert sum(searched) < 1.1 * (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("name", "data", "what", "line"),
    [
        ("a.txt", b"one\ntwo\ncaf\xe9\n", "not UTF-8", 3),
        ("a.txt", b"one\r\ntw\0o\r\n", "NUL", 2),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "NUL", 1),
        ("a.txt", codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"\x00\xd8", "not UTF-16", 2),
        ("a.txt", b"lone \xed\xa0\xbd", "not UTF-8", 1),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "not UTF-8", 2),
        ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": "ri\\ud83dver"}\n', "surrogate", 3),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "not a JSON object", 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\0"}\n', "NUL", 2),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "no key `text`", 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "holds int", 2),
        ("a.jsonl", b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", "not a JSON object", 2),
        ("a.jsonl", b"[" * 100_000 + b"\n", "nested too deeply", 1),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n[]\n'), "must be a JSON object", 2),
    ],
)
def test_what_is_broken_is_named_by_its_line(tmp_path: Path, name: str, data: bytes, what: str, line: int) -> None:
    (tmp_path / name).write_bytes(data)
    error = refusal(tmp_path / name)
    assert what in error.what
    assert str(error.where).endswith(f"{name}:{line}")


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.txt", b"%PDF-1.7 ...", "PDF"),
        ("a.txt", b"PK\x03\x04....", "zip"),
        ("a.md", b"{\\rtf1 words}", "RTF"),
        ("a.txt", gzip.compress(b"words"), "gzip"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git LFS"),
        ("a.txt.gz", b"words", "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(TEXT.encode() * 9)[:-9], "cannot be unpacked"),
        ("a.txt", ROWS.encode(), "JSON objects, not prose"),
        ("a.md", ROWS.replace('"text"', '"content"').encode(), "keys: content"),
        ("a", ROWS.replace('"text"', '"content"').encode(), "no key `text`; there are: content"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert what in refusal(tmp_path / name).what


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_what_unpacks_without_an_end_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "FREE", 1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(b" " * (8 << 20)))
    assert "unpack to more than" in refusal(tmp_path / name).what


def test_limits_of_a_line_and_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1 << 20)
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * (3 << 20) + '"}\n')
    (tmp_path / "a.txt").write_text("b" * (3 << 20))
    assert str(refusal(tmp_path / "a.jsonl").where).endswith(":2")
    assert "one text of more than" in refusal(tmp_path / "a.txt").what


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    for name, what in (
        (tmp_path / "pipe.txt", "a pipe"),
        ("/dev/zero", "a device"),
        (tmp_path / "loop.txt", "a loop"),
        (tmp_path / "gone.txt", "which is not there"),
        ("~nosuchuser/a.txt", "nobody's home"),
        ("a" * 300, "too long"),
        (tmp_path / "missing.txt", "no such text file"),
    ):
        assert what in refusal(name).what, name


def test_a_folder_is_read_without_what_is_hidden_or_of_another_kind(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name in (
        "a.TXT",
        "deep/b.txt",
        ".hidden.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "c.pdf",
        "d.json",
        "LICENSE",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.txt").write_text("elsewhere")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert names(folder) == ["a.TXT", "deep/b.txt"]
    (note,) = check_sources([TextSource(source=str(folder))])
    assert all(part in note for part in ("2 hidden", "links to folders (linked)", "1 .pdf", "1 .json"))


def test_links_stay_inside_a_folder_or_the_hub_cache(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("a blob")
    (folder / "a.txt").symlink_to("../../blobs/123")
    assert read(folder) == ["a blob"]
    (tmp_path / "secret").write_text("a key")
    (folder / "b.txt").symlink_to(tmp_path / "secret")
    assert "leads out of the folder" in refusal(folder).what
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("nowhere")
    assert "leads out" in refusal(folder).what or "not there" in refusal(folder).what


def test_endless_folders_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_ENTRIES", 10)
    for index in range(11):
        (tmp_path / f"{index}.txt").write_text("words")
    assert "more than 10 files" in refusal(tmp_path).what


def test_empty_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": null}\n')
    assert check_sources([TextSource(source=str(tmp_path / "a.jsonl"))]) == (
        "`a.jsonl`: 2 of 3 documents are empty and left out",
    )


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("python-docs", "python-docs"),
        ("self", "self"),
        ("x/python-docs", "python-docs-text"),
        ("all", "all-text"),
        ("x/self", "self-text"),
        ("hub:all", "all-text"),
        ("hub:owner/name:config", "owner-name-config"),
        ("a b\u202e|c.txt", "a-b-c.txt"),
        ("???", "text"),
        ("/", "text"),
        ("n" * 200, "n" * 80),
    ],
)
def test_kinds_are_harmless_and_none_of_our_own_words(source: str, kind: str) -> None:
    assert kind_of(source) == kind
