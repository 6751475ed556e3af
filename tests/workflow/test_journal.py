"""The journal: done means recorded and intact; a torn last line is as if it had not been written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retrofit import kv_heads
from retrofit.errors import UserError
from retrofit.system.resume import ResumeKey
from retrofit.workflow.journal import Entry, Journal, digests_of
from retrofit.workflow.steps.convert import Convert


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    (tmp_path / "1-convert").mkdir()
    (tmp_path / "1-convert" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "1-convert" / "README.md").write_text("a card that people may edit")
    digests = digests_of(tmp_path, [tmp_path / "1-convert"])
    assert list(digests) == ["1-convert/model.safetensors"]
    return Entry("convert", "abc", "1-convert", digests, seconds=1.5, result={"notes": ["ä"]})


def test_a_step_is_done_with_its_fingerprint_only(tmp_path: Path, entry: Entry) -> None:
    Journal(tmp_path).append(entry)
    again = Journal(tmp_path)
    assert again.done("convert", "abc") == entry
    assert again.done("convert", "abd") is None
    assert again.done("extend", "abc") is None


def test_a_changed_or_missing_artifact_is_not_done(tmp_path: Path, entry: Entry) -> None:
    Journal(tmp_path).append(entry)
    weights = tmp_path / "1-convert" / "model.safetensors"
    weights.write_bytes(b"Weights")
    assert Journal(tmp_path).done("convert", "abc") is None
    weights.unlink()
    assert Journal(tmp_path).done("convert", "abc") is None


def test_the_newest_line_of_a_step_counts(tmp_path: Path, entry: Entry) -> None:
    journal = Journal(tmp_path)
    journal.append(entry)
    journal.append(replace(entry, fingerprint="new"))
    assert journal.done("convert", "abc") is None
    assert Journal(tmp_path).done("convert", "new") is not None


def test_every_torn_last_line_is_dropped_and_overwritten(tmp_path: Path, entry: Entry) -> None:
    journal = Journal(tmp_path)
    journal.append(entry)
    journal.append(replace(entry, step="extend"))
    whole = journal.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole), 23):
        journal.path.write_bytes(whole[:cut])
        torn = Journal(tmp_path)
        assert [line.step for line in torn.entries] == ["convert"]
        torn.append(replace(entry, step="recover"))
        assert [line.step for line in Journal(tmp_path).entries] == ["convert", "recover"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, entry: Entry) -> None:
    journal = Journal(tmp_path)
    for _ in range(2):
        journal.append(entry)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0][:20] + b"\n" + lines[1])
    with pytest.raises(UserError, match="damaged") as caught:
        Journal(tmp_path)
    assert str(caught.value.where).endswith("journal.jsonl:1")


def test_the_fingerprint_depends_on_every_part_and_not_on_order() -> None:
    base = ResumeKey("convert", "1", {"a": 1, "b": 2}, {"x": "1"}).digest
    assert base == ResumeKey("convert", "1", {"b": 2, "a": 1}, {"x": "1"}).digest
    others = [
        ResumeKey("extend", "1", {"a": 1, "b": 2}, {"x": "1"}).digest,
        ResumeKey("convert", "2", {"a": 1, "b": 2}, {"x": "1"}).digest,
        ResumeKey("convert", "1", {"a": 1, "b": 3}, {"x": "1"}).digest,
        ResumeKey("convert", "1", {"a": 1, "b": 2}, {"x": "2"}).digest,
    ]
    assert len({base, *others}) == 5


def test_a_changed_conversion_is_another_step() -> None:
    assert str(kv_heads.VERSION) in Convert.version.split()
