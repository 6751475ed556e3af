"""The recipe for dialogues, end to end on a tiny model, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrofit.evaluation.scoring.losses import TokenLosses
from tests.dialogues import CHATML, FORGETS, says, small_talk, write_rows
from tests.tiny import save_tiny
from tests.workflow.conftest import retrofit

SMALL = (
    "convert.method=mean",
    "recover.tokens=2048",
    "recover.sequence_length=256",
    "recover.batch_size=2",
    "recover.eval_tokens=256",
    "recover.adapter.rank=2",
    "recover.allow_repeats=true",
    "evaluate.lengths=[128, 256]",
    "evaluate.common_knowledge=false",
    "evaluate.cost_lengths=[]",
    "evaluate.resamples=100",
    "evaluate.intermediate=false",
    "evaluate.continuation_tokens=0",
    "evaluate.documents=40",
    "publish=null",
    "convert.kv_heads=1",
)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("instruct") / "tiny")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def run(model: Path, out: Path, *overrides: str) -> Any:
    options = [part for one in (*SMALL, *overrides) for part in ("--set", one)]
    return retrofit("run", "chat-gqa", "--model", model, "--out", out, *options, "--json")


def with_text(file: Path, *more: str) -> tuple[str, str]:
    return f"recover.text=[{file}]", f"evaluate.text=[{', '.join([str(file), *more])}]"


def test_the_recipe_trains_and_measures_dialogues(instruct: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "talk.jsonl", small_talk(60))
    bound = 'require={ppl_ratio@256/chat: "<= 1000", tail_ppl_ratio@128/chat: "<= 1000"}'
    result = run(instruct, tmp_path / "out", *with_text(file, "python-docs"), bound)
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = json.loads(result.stdout)
    numbers = json.loads((tmp_path / "out" / "5-evaluate" / "metrics.json").read_text())["metrics"]
    assert {"ppl@256/chat", "ppl_ratio@256/chat", "ppl_ratio@128/python-docs"} <= set(numbers)
    assert all(one["passed"] for one in found["gate"])
    assert "the loss counts" in result.stderr
    assert "`chat`: 6 dialogues of" in result.stderr  # the last tenth, which is held out
    losses = TokenLosses.load(tmp_path / "out" / "losses" / "recovered.npz")
    chat = losses.of_kind("chat")
    assert chat.documents[0] == "talk.jsonl:55"
    assert sum(len(one) for one in chat.at(256)) < sum(map(len, chat.losses))
    assert numbers["ppl@256/chat"] == pytest.approx(float(np.exp(np.concatenate(chat.at(256)).mean())), rel=1e-5)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "chat" in report


def test_dialogues_alone_are_measured(instruct: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "talk.jsonl", small_talk(20))
    result = retrofit(
        "evaluate", instruct, "--text", file, "--lengths", "64,128", "--documents", "4", "--loss-on", "all", "--json"
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert {row["kind"] for row in json.loads(result.stdout)["rows"]} == {"chat", "all"}


@pytest.mark.parametrize(
    ("rows", "overrides", "says_what"),
    [
        ([*small_talk(9), says("a", " ")], (), "talk.jsonl:10"),
        ([*small_talk(9), {"messages": [{"content": "a"}]}], (), "turn 1 has no role"),
        ([says("e" * 400, "f"), says("g" * 400, "h")], (), "no dialogue has a turn of the assistant"),
        (small_talk(9), ("evaluate.context_gain=true",), "say nothing of long contexts"),
        (small_talk(9), ('require={ppl_ratio@256/talk.jsonl: "<= 2"}',), "no text `talk.jsonl` is evaluated"),
    ],
)
def test_bad_dialogues_are_refused_before_any_work(
    instruct: Path, tmp_path: Path, rows: list[Any], overrides: tuple[str, ...], says_what: str
) -> None:
    file = write_rows(tmp_path / "talk.jsonl", rows)
    bound = ('require={ppl_ratio@256/chat: "<= 1000"}',)
    result = run(instruct, tmp_path / "out", *with_text(file), *bound, *overrides)
    assert result.exit_code == 2
    assert says_what in result.output
    assert not (tmp_path / "out" / "1-convert").exists()


def test_a_template_that_cannot_mark_the_assistant_is_refused_with_its_row(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    (model / "chat_template.jinja").write_text(FORGETS)
    thought = says("1?", "<think>hm</think>1", "2?", "<think>hm</think>2")
    file = write_rows(tmp_path / "talk.jsonl", [*small_talk(9), thought])
    result = run(model, tmp_path / "out", *with_text(file), 'require={ppl_ratio@256/chat: "<= 1000"}')
    assert result.exit_code == 2
    assert "talk.jsonl:10" in result.output
    assert not (tmp_path / "out" / "1-convert").exists()


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "talk.jsonl", small_talk(9))
    model = save_tiny(tmp_path / "tiny")
    result = run(model, tmp_path / "out", *with_text(file), 'require={ppl_ratio@256/chat: "<= 1000"}')
    assert result.exit_code == 2
    assert "the model has no chat template" in result.output
