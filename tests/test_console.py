"""Progress and results: plain lines at a bounded rate, numbers for people, JSON for machines."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from retrofit.console import Console, PlainProgress, Progress, Silent, count, nbytes, plain_table, seconds, to_json


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
    assert lines[0] == "  train: 250 of 1,000 tokens, loss 0.4, 25 tokens/s, 30.0 s left"
    assert lines[-1] == "  train: 500 of 1,000 tokens, loss 0.2, 25 tokens/s in 20.0 s"


def test_every_kind_of_progress_is_one() -> None:
    assert isinstance(Silent(), Progress) and isinstance(PlainProgress(io.StringIO()), Progress)
    assert isinstance(Console("plain").progress, Progress)


def test_json_mode_writes_one_document_to_stdout() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console("json", out=out, err=err)
    console.progress.note("working")
    console.say("words")
    console.table("t", ["a"], [[1]])
    console.result({"value": np.float32(1.5), "path": Path("x"), "none": None, "nan": float("nan")})
    assert json.loads(out.getvalue()) == {"value": 1.5, "path": "x", "none": None, "nan": "nan"}
    assert "working" in err.getvalue()


def test_dataclasses_and_arrays_become_json() -> None:
    @dataclass(frozen=True)
    class Point:
        xs: tuple[int, ...]
        array: np.ndarray

    assert json.loads(to_json(Point((1, 2), np.arange(2)))) == {"xs": [1, 2], "array": [0, 1]}


def test_tables_align_numbers_right_and_words_left() -> None:
    text = plain_table("", ["name", "value"], [["a", "1"], ["long", "1,000"]])
    assert text.splitlines()[2:] == ["a         1", "long  1,000"]


def test_rich_tables_show_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    Console("rich").table("title", ["a", "b"], [["[bold]x[/bold]", 3]])
    assert "[bold]x[/bold]" in capsys.readouterr().out


def test_units() -> None:
    assert (seconds(3.21), seconds(250), seconds(7500)) == ("3.2 s", "4 min 10 s", "2 h 5 min")
    assert (nbytes(512), nbytes(1536), nbytes(5 << 30)) == ("512 B", "1.5 KiB", "5.0 GiB")
    assert (count(3), count(2.5), count(12345.6)) == ("3", "2.5", "12,346")
