"""The benchmark of windows: what it measures of a checkpoint, what is not measured again, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks import windows
from evals.benchmarks.windows_parts import Checkpoint, Row
from retrofit.model.cache_dtype import CACHE_DTYPES
from retrofit.model.load import load_tokenizer
from tests.tiny import save_tiny

SMALL = {"LENGTH": 256, "FAR_LENGTH": 1024, "PASSAGE": 32, "APART": 128, "RECOGNISED": 4}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the benchmark on a tiny model with these arguments -> its results."""
    books = tmp_path / "books"
    books.mkdir()
    for name in ("whale", "house"):
        words = (f"The {name} {i} was {i * i % 97} years old." for i in range(400))
        (books / f"{name}.txt").write_text("\n\n".join(words))
    read_before = tmp_path / "read.txt"
    read_before.write_text(" ".join(f"Number {i} stands before number {i + 1}." for i in range(800)))
    model = save_tiny(tmp_path / "tiny", "qwen2", num_hidden_layers=3)
    read = {"tokens": 1024, "measured_tokens": 256, "calibrate": [str(read_before)]}
    made = Checkpoint("original", "window", {"size": 32, "full_layers": [1], **read})
    for name, value in {
        **SMALL,
        "MODEL": str(model),
        "NEEDLES": {"needle": [256], "depths": 2, "multi_key": True},
    }.items():
        monkeypatch.setattr(windows, name, value)
    monkeypatch.setattr(windows, "CHECKPOINTS", {"windows": made})

    def in_process(options: Any, name: str) -> None:
        windows._write(windows.result_file(options.work, name), windows.measured(options.books, options.work, name))

    monkeypatch.setattr(windows, "_in_process", in_process)

    def main(*arguments: str) -> dict[str, Any]:
        given = ["--books", str(books), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["windows", *given, *arguments])
        windows.main()
        return json.loads((tmp_path / "out/windows.json").read_text())["rows"]

    return main


def test_a_checkpoint_is_measured_beside_the_original(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run("--parts", "windows")
    assert list(rows) == ["original", "windows"]
    assert rows["original"]["novels"]["ratio"] == 1
    assert rows["original"]["passages"]["rise"] == 0
    assert rows["windows"]["passages"]["tokens"] == 2 * (SMALL["PASSAGE"] - SMALL["RECOGNISED"])
    full, windowed = (rows[name]["kv_cache_bytes"]["1024"] for name in ("original", "windows"))
    assert full / windowed == pytest.approx(3 * 1024 / (1024 + 2 * 32))
    text = (tmp_path / "out/windows.md").read_text()
    assert "| windows of 1,024 in 24 of 30 layers |" in text
    monkeypatch.setattr(windows, "measured", None)
    assert run("--parts", "windows") == rows


def test_a_passage_comes_again_where_the_document_ends(run: Any, tmp_path: Path) -> None:
    files = windows.passages(tmp_path / "books", tmp_path / "passages")
    tokenizer = load_tokenizer(Path(windows.MODEL))
    for file in files:
        ids = tokenizer(Path(file).read_text(), add_special_tokens=False)["input_ids"]
        apart, passage = SMALL["APART"], SMALL["PASSAGE"]
        assert ids[apart : apart + passage] == ids[:passage]


def test_every_row_is_of_a_checkpoint_and_a_cache_that_there_are() -> None:
    assert {row.cache for row in windows.EVERY.values()} - {None} <= CACHE_DTYPES.keys()
    assert {row.checkpoint for row in windows.EVERY.values()} <= {"original", *windows.CHECKPOINTS}
    assert len({row.kind for row in windows.EVERY.values()}) <= 6  # styles of the chart
    assert all(isinstance(row, Row) for row in windows.EVERY.values())
