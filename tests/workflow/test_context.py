"""What a command opens, it opens once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import retrofit
from retrofit.model import load
from retrofit.model.families import describe
from retrofit.model.families.base import Family
from retrofit.recipe.schema import Evaluate, Recipe
from retrofit.system import device as sizes
from retrofit.workflow.opening import sized
from tests.tiny import tiny_config


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the configuration of each folder was loaded, and how often what was loaded was described."""
    counts: Counter[str] = Counter()
    found: list[Any] = []
    load_config, describe = load.load_config, Family.describe

    def counted(folder: str | Path) -> Any:
        counts[f"config {Path(folder).name}"] += 1
        found.append(load_config(folder))
        return found[-1]

    def described(family: Family, config: Any) -> Any:
        if any(config is one for one in found):  # not that of a model with fewer heads, or with weights
            counts[f"spec {Path(config.name_or_path).name}"] += 1
        return describe(family, config)

    monkeypatch.setattr(load, "load_config", counted)
    monkeypatch.setattr(Family, "describe", described)
    return counts


@pytest.mark.parametrize("method", ["mean", "calibrated"])
def test_a_conversion_loads_and_describes_its_model_once(
    method: str, model: Path, texts: Path, tmp_path: Path, loaded: Counter[str]
) -> None:
    text = {"calibrate": [str(texts / "train")], "tokens": 2048} if method == "calibrated" else {}
    retrofit.convert(model, kv_heads=1, method=method, out=tmp_path / "out", **text)
    assert loaded[f"config {model.name}"] == 1
    assert loaded[f"spec {model.name}"] == 1


def test_an_extension_loads_and_describes_its_model_once(model: Path, tmp_path: Path, loaded: Counter[str]) -> None:
    retrofit.extend(model, factor=2, out=tmp_path / "out")
    assert loaded[f"config {model.name}"] == 1
    assert loaded[f"spec {model.name}"] == 1


def test_an_evaluation_loads_and_describes_its_model_once(
    model: Path, texts: Path, tmp_path: Path, loaded: Counter[str]
) -> None:
    retrofit.evaluate(model, text=[str(texts / "held.txt")], lengths=[64])
    assert loaded[f"config {model.name}"] == 1
    assert loaded[f"spec {model.name}"] == 1


def test_a_recovery_loads_and_describes_each_of_its_models_once(
    model: Path, texts: Path, tmp_path: Path, loaded: Counter[str]
) -> None:
    student = tmp_path / "student"
    retrofit.convert(model, kv_heads=1, method="mean", out=student)
    loaded.clear()
    text = [str(texts / "train")]
    retrofit.recover(student, teacher=model, text=text, tokens=128, sequence_length=64, rank=2, out=tmp_path / "out")
    for name in (model.name, "student"):
        assert loaded[f"config {name}"] == 1, name
        assert loaded[f"spec {name}"] == 1, name


@pytest.mark.parametrize(
    ("device", "asked", "chunk"), [("cpu", {}, 512), ("cuda", {}, 8192), ("cuda", {"chunk": 512}, 512)]
)
def test_a_chunk_that_no_recipe_names_fills_the_device(
    device: str, asked: dict[str, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "total_memory", lambda device: 80 << 30)
    recipe = Recipe(name="r", model="m", evaluate=Evaluate(**asked))
    evaluate = sized(recipe, recipe, describe(tiny_config("llama")), device).evaluate
    assert evaluate is not None
    assert evaluate.chunk == chunk
