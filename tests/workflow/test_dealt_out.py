"""Commands of one step in several processes: the files and numbers of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from retrofit.evaluation.result import ModelEvaluation
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.kv_heads.sweep.price_list import PriceList
from retrofit.recipe.schema import Recipe
from retrofit.system.world import ALONE, World
from retrofit.workflow.command import evaluate, write
from retrofit.workflow.sweep import prices
from tests.ranks import on_ranks
from tests.tiny import save_tiny

WORDS = ("river", "garden", "engine", "letter", "winter", "mirror", "castle", "number", "city", "father")


def book(path: Path, seed: int) -> str:
    numbers = np.random.default_rng(seed).integers(0, len(WORDS), (60, 80))
    path.write_text("\n\n".join(" ".join(WORDS[i] for i in row) + "." for row in numbers))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", max_position_embeddings=512)


def converted(world: World, recipe: Recipe, out: Path) -> None:
    write(recipe, out, moments=out.with_name(f"{out.name}.moments"), world=world)


def test_a_conversion_is_that_of_one_process(model: Path, tmp_path: Path) -> None:
    text = [{"source": book(tmp_path / f"{seed}.txt", seed)} for seed in (1, 2)]
    calibration = {"text": text, "tokens": 2048, "sequence_length": 128}
    section = {"kv_heads": 2, "calibration": calibration}
    recipe = Recipe.model_validate(
        {"name": "convert", "model": str(model), "convert": section, "evaluate": None, "publish": None}
    )
    converted(ALONE, recipe, tmp_path / "one")
    on_ranks(tmp_path, 3, converted, recipe, tmp_path / "many")
    names = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("one", "many")]
    assert names[0] == names[1]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    assert not (tmp_path / "many.work").exists()
    assert len(list((tmp_path / "many.moments").glob("layer-*"))) == 2


def evaluated(world: World, recipe: Recipe, out: Path | None) -> ModelEvaluation:
    return replace(evaluate(recipe, out, world=world), losses=None)


@pytest.mark.parametrize("kept", [True, False])
def test_an_evaluation_is_that_of_one_process(kept: bool, model: Path, tmp_path: Path) -> None:
    section: dict[str, Any] = {"text": [{"source": book(tmp_path / "book.txt", 3)}], "lengths": [64, 128]}
    section |= {"documents": 3, "cost_lengths": [], "needle": {"lengths": [256], "depths": 2}}
    recipe = Recipe.model_validate({"name": "evaluate", "model": str(model), "evaluate": section, "publish": None})
    alone = evaluated(ALONE, recipe, tmp_path / "one.npz")
    out = tmp_path / "many.npz" if kept else None
    results = on_ranks(tmp_path, 2, evaluated, recipe, out)
    assert results == [alone, alone]
    if out is not None:
        first, second = (TokenLosses.load(tmp_path / name) for name in ("one.npz", "many.npz"))
        assert all(np.array_equal(a, b) for a, b in zip(first.losses, second.losses, strict=True))
        assert first.meta == second.meta


def priced(world: World, recipe: Recipe, moments: Path) -> PriceList:
    found = prices(recipe, command="", moments=moments, tokens=2048, world=world)
    return replace(found, notes=tuple(note.replace(str(moments), "") for note in found.notes))


def test_a_price_list_is_that_of_one_process(model: Path, tmp_path: Path) -> None:
    text = [{"source": book(tmp_path / f"{seed}.txt", seed)} for seed in (1, 2)]
    section = {"kv_heads": 1, "calibration": {"text": text, "tokens": 2048, "sequence_length": 128}}
    recipe = Recipe.model_validate({"name": "prices", "model": str(model), "convert": section, "evaluate": None})
    alone = priced(ALONE, recipe, tmp_path / "one")
    found = on_ranks(tmp_path, 2, priced, recipe, tmp_path / "many")
    assert found[0] == found[1]
    assert [price.how for price in found[0].prices] == [price.how for price in alone.prices]
    for one, other in zip(alone.prices, found[0].prices, strict=True):
        assert other.increase == pytest.approx(one.increase, abs=1e-6)
        assert other.cost == pytest.approx(one.cost, rel=1e-6)
    assert not (tmp_path / "many.work").exists()
