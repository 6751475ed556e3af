"""`retrofit window`, `plan --windows`, `plan --kv-budget` in several processes: what one of them writes and lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file

import retrofit
from retrofit.budget.rows import BudgetList
from retrofit.errors import PeerError, UserError
from retrofit.kv_heads.disk import StreamFolder
from retrofit.model.folder import ModelFolder
from retrofit.recipe.kv_budget import Budget
from retrofit.recipe.schema import Recipe
from retrofit.system.world import World
from retrofit.windows.price_list import WindowList
from retrofit.workflow import budgeting
from tests.ranks import on_ranks
from tests.tiny import save_tiny
from tests.workflow.test_budget import row, small

SIZE = 32
READ: dict[str, Any] = {"size": SIZE, "tokens": 2048, "device": "cpu", "progress": False}

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It becomes another architecture first, whose folder rank 0 writes for all."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2")


def windowed(world: World, model: Path, text: Path, out: Path) -> dict[str, Any]:
    reading: dict[str, Any] = {"calibrate": [str(text)], "measured_tokens": 512, "full_layers": 1}
    found = retrofit.window(model, out=out, **reading, **READ)
    return {**found.report, "seconds": 0.0}


def test_windows_are_those_of_one_process(llama: Path, texts: Path, tmp_path: Path) -> None:
    alone = windowed(World(), llama, texts / "train", tmp_path / "one")
    found = on_ranks(tmp_path, 2, windowed, llama, texts / "train", tmp_path / "many")
    assert found[0] == found[1], "every process returns what rank 0 has"
    assert found[0]["full_layers"] == alone["full_layers"]
    assert found[0]["choice"]["rounds"] == alone["choice"]["rounds"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=name)
    spec = ModelFolder(tmp_path / "many").spec
    assert sum(layer.window == SIZE for layer in spec.layers) == 2
    assert not (tmp_path / "many.work").exists()


def failing(world: World, model: Path, text: Path, out: Path) -> str:
    """One process fails in the middle of a layer."""

    def fail(*_: object) -> NoReturn:
        raise ValueError("a bug")

    if not world.main:
        StreamFolder.finished = fail  # type: ignore[method-assign]
    with pytest.raises(PeerError if world.main else ValueError) as caught:
        windowed(world, model, text, out)
    return str(caught.value)


def test_an_error_of_one_process_ends_all(llama: Path, texts: Path, tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, failing, llama, texts / "train", tmp_path / "out")
    assert first.startswith("another process of this command has ended")
    assert second == "a bug"
    assert not (tmp_path / "out").exists()


def refused(world: World, model: Path, text: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        windowed(world, model, text, out)
    return str(caught.value)


def test_what_rank_0_refuses_every_process_raises(llama: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "mine.txt").write_text("mine")
    first, second = on_ranks(tmp_path, 2, refused, llama, texts / "train", tmp_path / "out")
    assert "keeps unfinished work there, and it holds something else" in first
    assert first == second


def listed(world: World, model: Path, text: Path, moments: Path) -> WindowList:
    calibration = {"text": [str(text)], "tokens": 1024, "measured_tokens": 256}
    window = {"size": SIZE, "calibration": calibration}
    recipe = Recipe.model_validate({"name": "w", "model": str(model), "device": "cpu", "window": window})
    return retrofit.window_prices(recipe=recipe, moments=moments, progress=False)


def budgeted(world: World, model: Path, text: Path, moments: Path, budget: str) -> BudgetList:
    return retrofit.budget_prices(model, budget=budget, calibrate=[str(text)], moments=moments, **READ)


def test_a_list_of_windows_is_that_of_one_process(llama: Path, texts: Path, tmp_path: Path) -> None:
    alone = listed(World(), llama, texts / "train", tmp_path / "one")
    found = on_ranks(tmp_path, 2, listed, llama, texts / "train", tmp_path / "many")
    assert found[0] == found[1]
    assert found[0].choice == alone.choice
    for one, other in zip(alone.prices, found[0].prices, strict=True):
        assert (other.size, other.full_layers, other.how) == (one.size, one.full_layers, one.how)
        assert other.text == pytest.approx(one.text, abs=1e-6)
    assert listed(World(), llama, texts / "train", tmp_path / "many") == found[0], "nothing is measured again"


@pytest.mark.slow
def test_a_budget_is_met_as_one_process_meets_it(qwen: Path, texts: Path, tmp_path: Path) -> None:
    per_token = 2 * 2 * 4 * 16 * 4  # keys and values, layers, heads, head dim, float32
    budget = f"{per_token * 512 // 6}B@512"
    alone = budgeted(World(), qwen, texts / "train", tmp_path / "one", budget)
    found = on_ranks(tmp_path, 2, budgeted, qwen, texts / "train", tmp_path / "many", budget, seconds=300)
    assert found[0] == found[1]
    for one, other in zip(alone.rows, found[0].rows, strict=True):
        assert (one.heads.kv_heads, one.windows.size, one.stored) == (
            other.heads.kv_heads,
            other.windows.size,
            other.stored,
        )
        assert (one.measured is None) == (other.measured is None)
        if one.measured and other.measured:
            assert other.measured.text == pytest.approx(one.measured.text, abs=1e-5)
    assert alone.recommended is not None
    assert found[0].recommended is not None
    assert found[0].recommended.commands == alone.recommended.commands


def run_within(world: World, recipe: Path, out: Path) -> Any:
    """A run whose list recommends 2 KV heads and windows in layer 0."""

    def recommended(*_: object, **__: object) -> BudgetList:
        found = row(2, True, "int8")
        return BudgetList("m", Budget(100 << 10, 512), (found,), found, 0.2, 512, ("a",))

    with patch.object(budgeting, "budget_list", recommended):
        return retrofit.run(recipe, out=out, progress=False)


@pytest.mark.slow
def test_a_run_within_a_budget_is_that_of_one_process(qwen: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small(qwen, texts, recover=None)))
    alone = run_within(World(), path, tmp_path / "one")
    found = on_ranks(tmp_path, 2, run_within, path, tmp_path / "many", seconds=300)
    assert found[0] == found[1]
    assert found[0].metrics == pytest.approx(alone.metrics, rel=1e-4)
    first, second = (load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "many"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert [layer.window for layer in ModelFolder(tmp_path / "many/final").spec.layers] == [SIZE, None]
