"""`retrofit plan --kv-budget` as a user meets it: the list, the pilots, what is kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.budget.measure import losses_on
from retrofit.budget.rows import MEASURED, NOTHING, ORIGINAL, BudgetList, BudgetRow, Heads, Loss, Stored, Windows
from retrofit.kernels.rounded_cache import round_cache
from retrofit.kv_heads.sweep.budget import Budget
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Window
from retrofit.views.budget import budget
from retrofit.windows.rows import Repeats
from retrofit.workflow import budgeting, pilots
from tests.tiny import save_tiny
from tests.workflow.conftest import retrofit

PER_TOKEN = 2 * 2 * 4 * 16 * 4  # keys and values, layers, heads, head dim, float32


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2, which has windows by layer: 2 layers, 512 positions."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2")


@pytest.fixture(scope="module")
def asked(qwen: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Everything but the budget; what was measured is kept."""
    kept = tmp_path_factory.mktemp("kept") / "moments"
    reading = ("--size", 32, "--tokens", 2048, "--calibrate", texts / "train", "--device", "cpu")
    return ("plan", qwen, *reading, "--moments", kept, "--json", "--kv-budget")


@pytest.fixture(scope="module")
def listed(asked: tuple[object, ...]) -> dict[str, Any]:
    done = retrofit(*asked, f"{PER_TOKEN * 512 // 6}B@512")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def surgery(row: dict[str, Any]) -> bool:
    return (row["heads"]["how"], row["windows"]["how"]) != ("original", "original")


def test_the_best_rows_are_measured_before_one_is_recommended(listed: dict[str, Any]) -> None:
    rows = listed["rows"]
    assert [row["nbytes"] for row in rows] == sorted((row["nbytes"] for row in rows), reverse=True)
    first = rows[0]
    assert (first["heads"]["how"], first["windows"]["how"], first["stored"]["how"]) == ("original",) * 3
    assert first["nbytes"] == PER_TOKEN * 512
    measured = [
        row for row in rows if row["measured"] and (row["heads"]["how"], row["windows"]["how"]) != ("original",) * 2
    ]
    assert len(measured) == 3, "none of the types alone is small enough"
    assert listed["recommended"] in measured
    weight = listed["answer_weight"]
    assert weight == Window().text_loss / Window().answer_loss

    def weighed(row: dict[str, Any]) -> float:
        return max(0, row["measured"]["text"]) + weight * max(0, row["measured"]["answers"])

    assert weighed(listed["recommended"]) == min(map(weighed, measured))
    assert listed["recommended"]["nbytes"] <= PER_TOKEN * 512 // 6
    assert listed["recommended"]["commands"]
    assert any("no cache of q8_0 in the list" in note for note in listed["notes"])


def test_what_was_measured_is_kept_and_another_budget_reads_no_text(
    asked: tuple[object, ...], listed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(budgeting, "losses_on", never)
    monkeypatch.setattr(pilots, "write", never)
    again = retrofit(*asked, f"{PER_TOKEN * 512 // 6}B@512")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["recommended"] == listed["recommended"]
    half = json.loads(retrofit(*asked, f"{PER_TOKEN * 512 // 2}B@512", "--no-pilots").stdout)
    assert half["recommended"] is None
    whole = json.loads(retrofit(*asked, f"{PER_TOKEN * 512}B@512").stdout)
    assert whole["recommended"]["commands"] == []
    words = retrofit(*(word for word in asked if word != "--json"), f"{PER_TOKEN * 512}B@512").output
    assert "recommended: nothing; the model meets the budget as it is" in words
    words = retrofit(*(word for word in asked if word != "--json"), f"{PER_TOKEN * 512 // 2}B@1k", "--no-pilots").output
    assert "nothing is recommended" in words
    assert "beyond the model's 512 positions" in " ".join(words.split())


def test_a_cache_type_alone_can_be_the_best_answer() -> None:
    whole, none = Heads(4, NOTHING, ORIGINAL), Windows(None, (), NOTHING, ORIGINAL)
    stored = Stored("q8_0", Loss(0.001, 0.002), MEASURED)
    row = BudgetRow(whole, none, stored, 100, stored.loss, stored.loss, commands=("served by llama.cpp",))
    found = BudgetList("m", Budget(100, 1024), (row,), row, 0.2, 512, ("a",))
    said = str(list(budget(found))[-1])
    assert "4 KV heads, a cache of q8_0, 100 B, +0.001 / +0.002 measured; no surgery is the best answer" in said


def test_losses_are_those_of_one_pass_over_each_row(qwen: Path) -> None:
    model = ModelFolder(qwen)
    ids = torch.randint(5, 250, (3, 64), generator=torch.Generator().manual_seed(0))
    ids[:, -8:] = ids[:, :8]
    rows = Repeats(ids, ("a",) * 3, 0, 8, 32)
    for kind in ("auto", "fp8_e4m3"):
        loaded = model.load(dtype="float32", device="cpu")
        round_cache(loaded, kind)
        with torch.inference_mode():
            logits = loaded(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        losses = -logits.gather(-1, ids[:, 1:, None])[..., 0]
        parts = rows.parts
        expected = Loss(*(float(losses[:, parts[name]].mean()) for name in ("far", "answers")))
        found = losses_on(model, rows, kind, device="cpu")
        assert found.text == pytest.approx(expected.text, abs=1e-3)
        assert found.answers == pytest.approx(expected.answers, abs=1e-2)


def test_bad_input_is_told_before_any_work(qwen: Path, texts: Path) -> None:
    def error(*arguments: object) -> str:
        done = retrofit("plan", *arguments)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output
        return " ".join(done.output.split())

    reading = ("--size", 32, "--calibrate", texts / "train", "--device", "cpu")
    assert "is not a KV-cache budget" in error(qwen, "--kv-budget", "lots")
    assert "the smallest KV cache is" in error(qwen, *reading, "--tokens", 2048, "--kv-budget", "1KiB@512")
    assert "these are two lists" in error(qwen, "--windows", "--kv-budget", "1MiB@512")
    assert "only --kv-budget has pilots" in error(qwen, "--kv-heads", "--no-pilots")
    assert "too few tokens" in error(qwen, *reading, "--tokens", 300, "--kv-budget", "100KiB@512")
