"""The benchmark of head conversions: which rows are measured again, what is refused, and the command it records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.benchmarks import heads
from evals.benchmarks.heads import RESULTS, Row
from evals.benchmarks.heads_text import LENGTH, PIECES, Texts
from retrofit.data.documents import Document
from retrofit.report.charts.drawing import Line
from retrofit.report.charts.plots import perplexity_by_seconds
from tests.tiny import tiny_tokenizer

KIND = {
    "perplexity": 2.0,
    "ratio": 1.5,
    "tokens": 9,
    "median_added": 0.1,
    "worse": 0.5,
    "share_of_dearest_tenth": 0.3,
}


class FakeBench(heads.Bench):
    """A benchmark that writes down what it is asked to do. did: (what, row, whose checkpoint it starts from)."""

    did: list[tuple[str, ...]]
    kinds = ("python-docs",)

    def __init__(self, model: str, books: Path | None, tokens: int, distil: Any, work: Path, also: Any) -> None:
        self.identity, self.work, self.folder = [model, books is not None], work, work
        self.documents = [Document(kind, kind, np.arange(9), 9) for kind in self.kinds]
        self.did.append(("begun",))

    def score(self, folder: Path, kinds: Any = ()) -> Any:
        return tuple(kinds) or self.kinds

    def convert(self, row: Row, out: Path) -> dict[str, Any]:
        self.did.append(("convert", row.name))
        (out / "row").write_text(row.name)
        return {"seconds": 10.0, "layers": [], "calibrated_on": {}}

    def train(self, row: Row, start: Path, out: Path) -> dict[str, Any]:
        self.did.append(("train", row.name, (start / "row").read_text()))
        return {"seconds": 5.0, "steps": 1, "compute": "float32"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the benchmark with these arguments -> (what it did, its results)."""
    monkeypatch.setattr(heads, "Bench", FakeBench)
    monkeypatch.setattr(heads, "measured", lambda losses, original: {kind: dict(KIND) for kind in losses})
    monkeypatch.setattr(heads, "chart", lambda record: "")

    def main(*arguments: str) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
        FakeBench.did = []
        monkeypatch.setattr("sys.argv", ["heads", "--out", str(tmp_path), *arguments])
        heads.main()
        return FakeBench.did[1:], json.loads((tmp_path / "kv_heads.json").read_text())

    return main


def test_a_missing_start_is_measured_and_a_known_one_only_converted(run: Any) -> None:
    first = "+ o_proj + distillation, 50k"
    did, record = run("--only", first)
    assert did == [("convert", "+ o_proj"), ("train", first, "+ o_proj")]
    assert record["rows"][first]["seconds"] == 15.0
    assert record["rows"]["+ o_proj"]["seconds"] == 10.0
    stored = record["rows"][first]["settings"]
    assert (stored["rank"], stored["alpha"], stored["learning_rate"]) == (64, 128, None)
    assert stored["tokens"] == 50_000
    assert stored["calibration_tokens"] == 49_152
    assert stored["start"] == record["rows"]["+ o_proj"]["settings"]
    again, same = run("--only", first)
    assert again == []
    assert same == record
    second = "+ o_proj + distillation, 150k"
    did, record = run("--only", second)  # the temporary work folder of the first call is gone
    assert did == [("convert", "+ o_proj"), ("train", second, "+ o_proj")]
    assert record["rows"]["+ o_proj"] == same["rows"]["+ o_proj"]


def test_a_work_folder_is_gone_on_from(run: Any, tmp_path: Path) -> None:
    work = ("--work", str(tmp_path / "work"))
    run("--only", "mean", *work)
    did, _ = run("--only", "mean + LM LoRA, 50k", *work)
    assert did == [("train", "mean + LM LoRA, 50k", "mean")]


def test_a_kind_of_text_that_came_later_is_scored_where_the_checkpoint_is_kept(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bfloat16_products: bool
) -> None:
    work = ("--work", str(tmp_path / "work"))
    run("--only", "mean", *work)
    run("--only", "first")  # its checkpoint is gone
    monkeypatch.setattr(FakeBench, "kinds", ("python-docs", "unread pages"))
    did, record = run("--only", "mean", "first", *work)
    assert did == []
    assert list(record["rows"]["mean"]["by_kind"]) == ["python-docs", "unread pages"] == list(record["original"])
    assert list(record["rows"]["first"]["by_kind"]) == ["python-docs"]
    table = (tmp_path / "kv_heads.md").read_text()
    mark = "\\*" if bfloat16_products else ""
    assert f"| mean{mark} | 10 | 2 (1.5) | 2 (1.5) |" in table
    assert f"| first{mark} | 10 | 2 (1.5) |  |" in table
    assert ("on a processor with bfloat16 products" in table) == bfloat16_products


def test_unread_pages_share_nothing_with_what_fits_have_read(tmp_path: Path) -> None:
    words = [f"{first}{second}" for first in "abcdefghijklmnopqrstuvwxyz" for second in "abcdefghijklmnopqrstuvwxyz"]
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        lines = [" ".join(rng.choice(words, 12)) for _ in range(600)]
        (tmp_path / f"novel{seed}.txt").write_text("\n".join(lines))
    texts = Texts(tmp_path, tiny_tokenizer(), tmp_path, tokens=4096, distil=[20_000])
    rows = texts.training(20_000).ids_NT.numpy()
    unread = texts.unread([rows])
    assert len(unread) == PIECES
    assert all(len(piece) == LENGTH for piece in unread)
    read = " ".join(",".join(map(str, row)) for row in rows.tolist())
    starts = range(1, LENGTH - 32, 32)
    assert ",".join(map(str, rows[3, 1:33].tolist())) in read
    assert not any(",".join(map(str, piece[i : i + 32].tolist())) in read for piece in unread for i in starts)
    assert texts.unread([texts.training(1_000_000).ids_NT.numpy()]) == []


def test_rows_of_other_settings_are_measured_again_and_those_of_the_same_are_known(run: Any, tmp_path: Path) -> None:
    _, record = run("--only", "mean", "mean + LM LoRA, 50k")
    file = tmp_path / "kv_heads.json"
    record["rows"]["mean + LM LoRA, 50k"]["settings"]["rank"] = 16
    file.write_text(json.dumps(record))
    did, _ = run("--only", "mean + LM LoRA, 50k")
    assert did == [("convert", "mean"), ("train", "mean + LM LoRA, 50k", "mean")]
    did, _ = run("--only", "mean", "mean + LM LoRA, 50k")
    assert did == []


def test_results_of_other_options_are_refused_before_any_work(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / heads.HELD_OUT).write_text("text")
    run("--only", "first")
    for other in (["--model", "other/model"], ["--tokens", "4096"], ["--books", str(tmp_path)]):
        with pytest.raises(SystemExit):
            run("--only", "mean", *other)
        assert FakeBench.did == []
        assert "--model embedded, without --books, --tokens 49152: use another --out" in capsys.readouterr().err


def test_the_recorded_command_gives_the_same_rows(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / heads.HELD_OUT).write_text("text")
    options = ("--model", "owner/my model", "--tokens", "4096", "--books", str(tmp_path))
    _, record = run(*options, "--distil", "20000", "--only", "mean + LM LoRA, 20k")
    assert record["command"] == (
        "OMP_NUM_THREADS=1 python -m evals.benchmarks.heads --model 'owner/my model' --books DIR --tokens 4096 "
        "--distil 20000"
    )
    assert str(tmp_path) not in json.dumps(record)
    table = (tmp_path / "kv_heads.md").read_text()
    assert "my model, converted to 1 KV head" in table
    did, record = run(*options, "--only", "mean")
    assert did == []
    assert record["command"].endswith("--distil 20000")


def test_a_file_adds_rows_whose_mix_of_other_text_has_it(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wiki.txt"
    with pytest.raises(SystemExit):
        run("--also", str(file))
    assert "--also: there is no " in capsys.readouterr().err
    file.write_text("text")
    name = "+ o_proj, other text with wiki"
    did, record = run("--also", str(file), "--only", name, "+ o_proj, other text")
    assert did == [("convert", name), ("convert", "+ o_proj, other text")]
    assert record["rows"][name]["settings"]["also"] == "wiki.txt"
    assert "also" not in record["rows"]["+ o_proj, other text"]["settings"]
    assert record["command"].endswith(" --also wiki.txt")
    assert str(tmp_path) not in json.dumps(record)
    did, _ = run("--also", str(file), "--only", name)
    assert did == []


def test_another_machine_is_told_and_the_first_ones_stays(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    there = {"cpu": "another", "threads": "1", "torch": "2", "transformers": "5"}
    _, before = run("--only", "first")
    monkeypatch.setattr(heads, "machine", lambda: there)
    _, record = run("--only", "mean")
    assert record["machine"] == before["machine"]
    assert record["rows"]["mean"]["machine"] == there
    assert " and of another, torch 2, transformers 5." in (tmp_path / "kv_heads.md").read_text()


def test_the_results_in_the_repository_are_readable() -> None:
    record = json.loads((RESULTS / "kv_heads.json").read_text())
    table = heads.shown(record)
    assert "SmolLM2-135M-Instruct, converted to 1 KV head in every layer" in table
    assert heads._typed(record).model == "embedded"
    assert heads._typed(record).books


def test_points_that_are_not_one_way_are_not_joined() -> None:
    lines = [Line("methods", [1, 10, 100], [9, 3, 5]), Line("training", [1, 10, 100], [9, 8, 7])]
    joined, apart = (
        perplexity_by_seconds("chart", lines, original=2.0, apart=labels, alone=True).svg
        for labels in ((), ("methods",))
    )
    assert joined.count("stroke-linecap: square") == apart.count("stroke-linecap: square") + 1
