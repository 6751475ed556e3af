"""A run removes and replaces what a run wrote, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.workflow.journal import NAME, Entry, Journal, digests_of, is_run
from tests.workflow.conftest import retrofit

Recipe = Callable[..., Path]
LITTLE = {"context": None, "recover": None, "evaluate": None, "publish": None, "require": {}}


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_bytes(b"weights")
    return Entry("publish", "abc", "final", digests_of(tmp_path, [tmp_path / "final"]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mark", ["recipe.yaml", NAME, "report.md", "final/thesis.txt", "1-convert.work/thesis.txt"])
def test_a_folder_that_no_run_made_is_refused_and_stays(mark: str, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / mark).parent.mkdir(parents=True)
    (folder / mark).write_text("# years of work\n")
    before = contents(folder)
    result = retrofit("run", recipe(**LITTLE), "--out", folder)
    assert result.exit_code == 2
    assert "something that is not a run" in result.output
    assert contents(folder) == before


def test_what_somebody_added_to_a_run_folder_stays(recipe: Recipe, tmp_path: Path) -> None:
    run, file = tmp_path / "run", recipe(**LITTLE)
    assert retrofit("run", file, "--out", run).exit_code == 0
    (run / "notes.txt").write_text("years of work")
    (run / "recipe.yaml").write_text("# my comment\n" + (run / "recipe.yaml").read_text())
    (run / "moments").mkdir()
    (run / "moments" / "thesis.txt").write_text("years of work")
    assert retrofit("run", file, "--out", run, "--set", "convert.kv_heads=2").exit_code == 0
    assert (run / "notes.txt").read_text() == "years of work"
    assert (run / "moments" / "thesis.txt").read_text() == "years of work"
    assert (run / "recipe.edited.yaml").read_text().startswith("# my comment")
    (run / "1-convert" / "model-q8.gguf").write_text("hours of work")
    again = retrofit("run", file, "--out", run, "--set", "convert.kv_heads=2")
    assert again.exit_code == 0, "nothing has to be written again"
    result = retrofit("run", file, "--out", run)
    assert result.exit_code == 2
    assert "`1-convert/model-q8.gguf` was not written by this run" in result.output
    assert (run / "1-convert" / "model-q8.gguf").read_text() == "hours of work"


def test_only_a_journal_of_ours_makes_a_folder_a_run(tmp_path: Path, entry: Entry) -> None:
    assert not is_run(tmp_path)
    for text in ("", "{}\n", "[1]\n", '{"step": "x"}\n', "thesis\n", "[" * 100_000):
        (tmp_path / NAME).write_text(text)
        assert not is_run(tmp_path), text[:20]
    (tmp_path / NAME).unlink()
    Journal(tmp_path).mark()
    assert is_run(tmp_path)
    (tmp_path / NAME).unlink()
    Journal(tmp_path).append(entry)  # of a run whose journal had no mark yet
    assert is_run(tmp_path)
    (tmp_path / NAME).rename(tmp_path / "elsewhere")
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    assert not is_run(tmp_path)


def test_the_journal_knows_what_a_run_wrote(tmp_path: Path, entry: Entry) -> None:
    journal = Journal(tmp_path)
    assert journal.foreign("final") == ["final/model.safetensors"]
    journal.begin("publish", ["final", "4-work"])
    (tmp_path / "4-work").mkdir()
    (tmp_path / "4-work" / "half").write_text("")
    assert journal.foreign("final") == []
    journal.append(entry)
    (tmp_path / "final" / "deep").mkdir()
    (tmp_path / "final" / "deep" / "thesis.txt").write_text("years of work")
    (tmp_path / "final" / "README.md").write_text("a card")
    for known in (journal, Journal(tmp_path)):
        assert known.foreign("final") == ["final/deep/thesis.txt"]
        assert known.foreign("4-work") == []
        assert known.foreign("final-2") == []
    journal.begin("publish", ["final"])
    assert Journal(tmp_path).foreign("final") == [], "whatever is there now, the step was writing it"


@pytest.mark.parametrize(
    "line",
    [
        '{"begins": "convert", "paths": [5]}',
        '{"begins": "convert"}',
        '{"writes": "recipe.yaml", "sha256": ["x"]}',
        '{"step": "convert", "fingerprint": "x", "artifact": "final", "digests": "x"}',
        '{"step": 5, "fingerprint": "x", "artifact": "final", "digests": {}}',
        "[" * 100_000,
    ],
)
def test_a_line_that_no_run_wrote_is_told_by_its_number(line: str, tmp_path: Path, entry: Entry) -> None:
    Journal(tmp_path).append(entry)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes() + line.encode() + b"\n{}\n")
    with pytest.raises(UserError, match="damaged") as caught:
        Journal(tmp_path)
    assert str(caught.value.where).endswith(f"{NAME}:2")


def test_a_card_in_the_folder_of_a_step_that_writes_none_is_not_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "1-convert").mkdir()
    (tmp_path / "1-convert" / "config.json").write_text("{}")
    digests = digests_of(tmp_path, [tmp_path / "1-convert"])
    journal = Journal(tmp_path)
    journal.append(Entry("convert", "abc", "1-convert", digests))
    (tmp_path / "1-convert" / "README.md").write_text("years of work")
    assert journal.foreign("1-convert") == ["1-convert/README.md"]


def test_an_edited_file_is_kept_under_another_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.write_own("report.md", b"one") is None
    assert Journal(tmp_path).write_own("report.md", b"two") is None
    (tmp_path / "report.md").write_bytes(b"mine")
    assert Journal(tmp_path).write_own("report.md", b"three") == tmp_path / "report.edited.md"
    (tmp_path / "report.md").write_bytes(b"mine again")
    assert Journal(tmp_path).write_own("report.md", b"three") == tmp_path / "report.edited-2.md"
    assert (tmp_path / "report.edited.md").read_bytes() == b"mine"
    assert (tmp_path / "report.md").read_bytes() == b"three"
