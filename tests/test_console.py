"""Progress and results: plain lines at a bounded rate, numbers for people, JSON for machines."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from retrofit.console import Console, PlainProgress, Progress, RichProgress, Silent, to_json
from retrofit.escape import visible
from retrofit.tables import Table, as_html, plain_text
from tests.hostile import HOSTILE


def test_plain_progress_tells_rate_fields_and_time_left() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = PlainProgress(stream, clock=lambda: now[0])
    progress.start("train", 1000, "tokens")
    for step in range(1, 11):
        now[0] = 2.0 * step
        progress.advance(50, loss=2.0 / step)
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3, "one line in ten seconds, and one at the end"
    assert lines[0] == "  train: 250 of 1,000 tokens, loss 0.4, 25 tokens/s, 30 s left"
    assert lines[-1] == "  train: 500 of 1,000 tokens, loss 0.2, 25 tokens/s in 20 s"


def test_every_kind_of_progress_is_one() -> None:
    assert isinstance(Silent(), Progress)
    assert isinstance(PlainProgress(io.StringIO()), Progress)
    assert isinstance(Console("plain").progress, Progress)


def test_json_mode_writes_one_document_to_stdout() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console("json", out=out, err=err)
    console.progress.note("working")
    value = {"value": np.float32(1.5), "path": Path("x"), "none": None, "nan": float("nan")}
    console.show(value, ["words", Table("t", ["a"], [[1]])])
    assert json.loads(out.getvalue()) == {"value": 1.5, "path": "x", "none": None, "nan": "nan"}
    assert "working" in err.getvalue()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("out", "shown"), [(_Terminal(), "written\n"), (io.StringIO(), "note: read twice\nwritten\n")])
def test_a_note_stands_once_in_a_terminal(out: io.StringIO, shown: str) -> None:
    console = Console(out=out, err=_Terminal())
    console.progress.note("read twice")
    console.show(None, ["note: read twice", "written"])
    assert out.getvalue() == shown


def test_a_note_stands_once_in_a_log_that_both_streams_go_to(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as out, os.fdopen(os.dup(out.fileno()), "w") as err:
        console = Console(out=out, err=err)
        console.progress.note("read twice")
        out.flush()
        console.show(None, ["note: read twice", "note: read once"])
    assert (tmp_path / "log").read_text() == "  read twice\nnote: read once\n"
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        console = Console(out=out, err=err)
        console.progress.note("read twice")
        console.show(None, ["note: read twice"])
    assert (tmp_path / "out").read_text() == "note: read twice\n", "who reads one of them misses nothing"


def test_a_note_that_was_not_shown_on_the_way_is_shown_with_the_result() -> None:
    console = Console(out=_Terminal(), err=_Terminal())
    console.show(None, ["note: read twice"])
    assert console.out.getvalue() == "note: read twice\n"  # type: ignore[attr-defined]


def test_dataclasses_and_arrays_become_json() -> None:
    @dataclass(frozen=True)
    class Point:
        xs: tuple[int, ...]
        array: np.ndarray

    assert json.loads(to_json(Point((1, 2), np.arange(2)))) == {"xs": [1, 2], "array": [0, 1]}


def test_tables_align_numbers_right_and_words_left() -> None:
    text = plain_text(Table("", ["name", "value"], [["a", "1"], ["long", "1,000"]]))
    assert text.splitlines()[2:] == ["a         1", "long  1,000"]


def test_rich_tables_show_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    Console("rich").show(None, [Table("title", ["a", "b"], [["[bold]x[/bold]", 3]])])
    assert "[bold]x[/bold]" in capsys.readouterr().out


def test_a_notebook_shows_the_same_table() -> None:
    text = as_html([Table("title", ["name", "value"], [["a", 1], ["b", None]]), "one\n\ntwo", ""])
    assert '<caption style="text-align: left">title</caption>' in text
    assert '<td style="text-align: left">b</td><td style="text-align: right">-</td>' in text
    assert text.rstrip().endswith("<p>one<br>two</p>")


@pytest.mark.parametrize("text", [*HOSTILE, "<script>x</script>", "&amp;", "\"'"])
def test_foreign_words_in_a_notebook_are_shown_as_words(text: str) -> None:
    shown = as_html([Table(f"t{text}", [f"c{text}"], [[f"v{text}"]]), f"line {text}"])
    assert visible(shown, keep="\n") == shown
    assert "<script" not in shown
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(shown)
    parser.close()
    assert f"v{visible(text)}" in "".join(found)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def words_of(text: str) -> str:
    """What a terminal shows of a text without the colours and movements of our own; white space is left out."""
    return re.sub(r"\s", "", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


@pytest.mark.parametrize("mode", ["plain", "rich"])
@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_words_are_words_on_a_terminal(
    text: str, mode: Literal["plain", "rich"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    out, err = Terminal(), Terminal()
    console = Console(mode, out=out, err=err)
    console.say(f"say {text}")
    console.show(None, [Table(f"title {text}", [f"column {text}"], [[f"cell {text}"]])])
    progress = RichProgress(err) if mode == "rich" else PlainProgress(err)
    progress.note(f"note {text}")
    progress.start(f"task {text}", 3, "steps")
    progress.advance(1, field=text)
    progress.finish()
    seen = words_of(visible(text))
    shown, told = words_of(out.getvalue()), words_of(err.getvalue())
    for word in ("title", "column", "cell"):
        assert word + seen in shown
    for word in ("note", "task", "field"):
        assert word + seen in told
    everything = shown + told
    assert visible(everything) == everything


def test_json_keeps_foreign_words_without_control_characters() -> None:
    out = io.StringIO()
    Console("json", out=out).result({"all": HOSTILE})
    assert json.loads(out.getvalue()) == {"all": list(HOSTILE)}
    assert visible(out.getvalue(), keep="\n") == out.getvalue()
