"""A run knows which of the texts it measures are of a kind that its steps have read, and every table says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.workflow.conftest import retrofit, sections

SEEN = {"held.txt": [], "train": ["calibration", "training"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path) -> SimpleNamespace:
    """Calibrated and trained on one folder, measured on its held-out side and on another text."""
    folder = tmp_path_factory.mktemp("seen")
    values = sections(model, texts)
    values |= {
        "convert": {
            "kv_heads": 1,
            "calibration": {"text": [str(texts / "train")], "tokens": 512, "sequence_length": 64},
        },
        "context": None,
        "evaluate": {
            **values["evaluate"],
            "text": [str(texts / "held.txt"), str(texts / "train")],
            "lengths": [64, 128],
            "cost_lengths": [],
            "continuation_tokens": 0,
            "intermediate": False,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = retrofit("run", folder / "recipe.yaml", "--out", folder / "out")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return SimpleNamespace(out=folder / "out", shown=" ".join(result.stdout.split()))


def test_the_result_and_the_record_have_it_by_kind(done: SimpleNamespace) -> None:
    original, last = json.loads((done.out / "5-evaluate" / "metrics.json").read_text())["models"]
    assert original["seen"] == {}, "no step made it"
    assert last["seen"] == SEEN
    record = json.loads((done.out / "final" / "retrofit.json").read_text())
    assert record["seen"] == SEEN
    assert [step["read"] for step in record["steps"]] == [{"calibration": ["train"]}, {"training": ["train"]}]


def test_report_card_and_terminal_mark_every_kind(done: SimpleNamespace) -> None:
    report = (done.out / "report.md").read_text()
    assert "### held.txt (unseen)" in report
    assert "### train (read in calibration, training)" in report
    assert "| text | read in | tokens | all tokens | rank 1-10 |" in report
    assert "No kind of text that was measured is unseen" not in report
    card = (done.out / "final" / "README.md").read_text()
    assert "Text `held.txt` (unseen: no step read text of this kind):" in card
    assert "Text `train` (other documents of it were read in calibration, training):" in card
    assert "text read in tokens" in done.shown
    assert "held.txt unseen 64" in done.shown


def test_losses_are_compared_by_the_rank_of_the_token(done: SimpleNamespace) -> None:
    losses = done.out / "losses"
    shown = " ".join(retrofit("compare", losses / "original.npz", losses / "recovered.npz").output.split())
    assert "text read in rank tokens a b b / a interval" in shown
    assert "held.txt unseen 1-10" in shown
    assert "train calibration, training 11-100" in shown
    last = json.loads((done.out / "5-evaluate" / "metrics.json").read_text())["models"][-1]
    every = {one["kind"]: one for one in last["by_frequency"] if one["first"] == 1 and one["last"] is None}
    rows = {(row["kind"], row["length"]): row["ppl"] for row in last["rows"]}
    for kind, band in every.items():
        assert (band["length"], band["after"]) == (128, pytest.approx(rows[kind, 128]))


def test_a_checkpoint_measured_alone_says_it_from_its_record(done: SimpleNamespace, texts: Path) -> None:
    measured = ("--lengths", 64, "--text", texts / "train")
    shown = " ".join(retrofit("evaluate", done.out / "final", *measured).output.split())
    assert "train calibration, training 64" in shown
    assert "No kind of text that was measured is unseen: calibration and training read other documents" in shown
