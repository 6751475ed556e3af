"""`retrofit plan --kv-budget` as a user meets it: the list, the pilots, what is kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from retrofit.budget.measure import losses_on
from retrofit.budget.rows import (
    MEASURED,
    NOTHING,
    ORIGINAL,
    PREDICTED,
    BudgetList,
    BudgetRow,
    Heads,
    Loss,
    Stored,
    Windows,
)
from retrofit.console import jsonable
from retrofit.errors import UserError
from retrofit.kernels.rounded_cache import round_cache
from retrofit.model.families import describe
from retrofit.model.folder import ModelFolder
from retrofit.recipe.kv_budget import Budget
from retrofit.recipe.schema import Recipe, Window
from retrofit.system.world import ALONE
from retrofit.views.budget import budget
from retrofit.windows import row_length
from retrofit.windows.price_list import sizes_within
from retrofit.windows.rows import Repeats
from retrofit.workflow import budgeted, budgeting, pilots
from retrofit.workflow.windowing import length_of, require_sequences
from tests.tiny import save_tiny, tiny_config
from tests.workflow.conftest import retrofit, sections

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


def test_pilots_of_every_size_that_is_priced_have_enough_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[Recipe] = []
    monkeypatch.setattr(pilots, "write", lambda recipe, out, **_: written.append(recipe))
    monkeypatch.setattr(pilots, "await_folder", lambda folder: None)
    context: Any = SimpleNamespace(native=8192, world=ALONE)
    window = Window(size=512, calibration={"tokens": 16_384, "measured_tokens": 2048})
    recipe, native = Recipe(name="x", model="m", window=window), context.native
    for size in sizes_within(length_of(window, native), window.size, describe(tiny_config("qwen2"))):
        one = BudgetRow(*_parts(size), 1, NOTHING)
        pilots._converted(one, recipe, context, tmp_path, 1, None, None)
        section = written[-1].window
        assert section is not None
        assert section.size == size
        require_sequences(section, length_of(section, native))
        assert length_of(section, native) >= row_length(size)
    assert len(written) == 3


def _parts(size: int) -> tuple[Heads, Windows, Stored]:
    windows = Windows(size, (1,), NOTHING, PREDICTED)
    return Heads(4, NOTHING, ORIGINAL), windows, Stored("auto", NOTHING, ORIGINAL)


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
    for list_ in (("--kv-budget", "100KiB@512"), ("--windows",), ("--kv-heads",)):
        assert "--set changes a value of a recipe" in error(qwen, *list_, "--set", "window.size=32")
    said = error(qwen, *reading[2:], "--size", 300, "--kv-budget", "100KiB@512")
    assert "is measured on sequences of 600" in said
    assert "where: --size 300 fix: give at most 256" in said
    said = error(qwen, *reading, "--tokens", 2048, "--kv-budget", "100KiB@512", "--moments", texts)
    assert "give another --moments" in said


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[BudgetRow]:
    """A run with a budget gets the last of these rows as recommended."""
    rows: list[BudgetRow] = []

    def listed_as(recipe: Any, asked: Budget, **_: object) -> BudgetList:
        assert asked == Budget(100 << 10, 512)
        assert recipe.convert.calibration.tokens > 0
        return BudgetList("m", asked, tuple(rows), rows[-1], 0.2, 512, ("a",))

    monkeypatch.setattr(budgeting, "budget_list", listed_as)
    return rows


def row(heads: int | None, windowed: bool, stored: str) -> BudgetRow:
    lost = Loss(0.1, 0.2)
    return BudgetRow(
        Heads(4, NOTHING, ORIGINAL) if heads is None else Heads(heads, lost, MEASURED),
        Windows(32, (1,), lost, MEASURED) if windowed else Windows(None, (), NOTHING, ORIGINAL),
        Stored(stored, NOTHING if stored == "auto" else lost, ORIGINAL if stored == "auto" else MEASURED),
        1000,
        lost,
        lost,
    )


def small(qwen: Path, texts: Path, **changed: object) -> dict[str, Any]:
    """A recipe with a budget that takes seconds."""
    values = sections(qwen, texts)
    reading = {"text": [str(texts / "train")], "tokens": 2048}
    return {
        **values,
        "budget": {"kv_cache": "100KiB@512"},
        "convert": {"kv_heads": 1, "calibration": {**reading, "sequence_length": 128}, "repair": "none"},
        "window": {"size": 64, "calibration": {**reading, "measured_tokens": 256}, "repair": "none"},
        "context": None,
        "evaluate": {**values["evaluate"], "lengths": [64], "cost_lengths": [], "continuation_tokens": 0},
        **changed,
    }


def test_a_run_does_what_the_list_recommends_and_is_decided_once(
    qwen: Path, texts: Path, tmp_path: Path, decided: list[BudgetRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(small(qwen, texts)))
    decided.append(row(2, True, "int8"))
    done = retrofit("run", path, "--out", out)
    assert done.exit_code == 0, done.output
    final = ModelFolder(out / "final").spec
    assert [layer.kv_heads for layer in final.layers] == [2, 2]
    assert [layer.window for layer in final.layers] == [32, None]
    kept = json.loads((out / "budget.json").read_text())
    assert kept["list"]["recommended"]["heads"]["kv_heads"] == 2
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (written["convert"]["kv_heads"], written["window"]["size"]) == (2, 32)
    assert written["convert"]["repair"] == "none", "how it is converted is the recipe's"
    report = " ".join((out / "report.md").read_text().split())
    assert "the budget counts on a KV cache of int8" in report
    monkeypatch.setattr(budgeting, "budget_list", None)  # it is not asked again
    again = retrofit("run", out, "--json")
    assert again.exit_code == 0, again.output
    assert "publish" in json.loads(again.stdout)["reused"]


@pytest.mark.parametrize("changed", [{}, {"list": None}, {"list": {"recommended": {"heads": 3}}}, {"list": [1]}])
def test_a_decision_that_somebody_changed_is_refused(
    qwen: Path, texts: Path, tmp_path: Path, decided: list[BudgetRow], changed: dict[str, Any]
) -> None:
    recipe = Recipe.model_validate({**small(qwen, texts), "model": str(qwen)})
    decided.append(row(2, True, "int8"))
    usual: dict[str, Any] = {"revision": None, "progress": None}
    budgeted.with_budget(recipe, tmp_path / "run", **usual)
    file = tmp_path / "run/budget.json"
    file.write_text(json.dumps({"question": json.loads(file.read_text())["question"], **changed}))
    with pytest.raises(UserError, match="not what this program wrote") as caught:
        budgeted.with_budget(recipe, tmp_path / "run", **usual)
    assert caught.value.where == "budget.json"


def test_what_a_recipe_leaves_open_follows_the_model_after_the_decision() -> None:
    recipe = Recipe(name="x", model="m", budget={"kv_cache": "1MiB@512"})  # type: ignore[arg-type]
    made = budgeted._made(recipe, jsonable(row(2, True, "int8")))  # type: ignore[arg-type]
    assert made.convert is not None
    assert made.window is not None
    assert made.evaluate is not None
    assert made.convert.model_fields_set == {"kv_heads"}
    assert made.window.model_fields_set == {"size", "full_layers"}
    assert "lengths" not in made.evaluate.model_fields_set
    alone = budgeted._made(recipe, jsonable(row(None, False, "int8")))  # type: ignore[arg-type]
    assert alone.evaluate is not None
    assert alone.evaluate.model_fields_set == {"kv_cache_dtype"}
    assert (alone.convert, alone.window, alone.publish) == (None, None, None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"evaluate.lengths": [4096], "require": {}}, "4096 tokens are more than the 512 positions"),
        ({"convert.calibration.tokens": 100_000}, "too little text"),
        ({"window.calibration.tokens": 100_000}, "too little text"),
    ],
)
def test_what_follows_the_decision_is_checked_before_it(
    qwen: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(budgeting, "budget_list", lambda *_, **__: pytest.fail("long work"))
    values = small(qwen, texts)
    for key, value in changed.items():
        *sections_of, last = key.split(".")
        place: Any = values
        for name in sections_of:
            place = place[name]
        place[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    refused = retrofit("run", path, "--out", tmp_path / "run")
    assert refused.exit_code == 2, refused.output
    assert said in " ".join(refused.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "left"), [([1], "auto"), (0, "auto"), (1, 1), ("1/4", "1/4")])
def test_layers_that_a_recipe_names_are_left_to_the_list(given: object, left: object) -> None:
    window = Window(size=32, full_layers=given)  # type: ignore[arg-type]
    assert budgeting._fitting(window, 512, None).full_layers == left


def test_a_cache_type_alone_is_measured_and_nothing_is_published(
    qwen: Path, texts: Path, tmp_path: Path, decided: list[BudgetRow]
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(small(qwen, texts)))
    decided.append(row(None, False, "int8"))
    done = retrofit("run", path, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["final"] is None
    assert [model["kv_cache_dtype"] for model in found["models"].values()] == ["int8"]


def test_a_recipe_with_a_budget_is_planned_without_it_and_says_so(qwen: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small(qwen, texts)))
    assert "the budget decides when the run starts" in " ".join(retrofit("plan", path).output.split())
    path.write_text(yaml.safe_dump(small(qwen, texts, budget={"kv_cache": "some"})))
    refused = retrofit("plan", path)
    assert refused.exit_code == 2
    assert "is not a KV-cache budget" in " ".join(refused.output.split())
