"""Recipes with odd values: the dry run refuses them in a message or plans them, and writes nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from retrofit.errors import UserError
from tests.attack.limits import within
from tests.fuzz.edits import ODD, Choices, edited
from tests.workflow.conftest import sections

SECONDS = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe with every step, on a tiny model and made-up texts."""
    from tests.golden import prose
    from tests.tiny import save_tiny

    folder = tmp_path_factory.mktemp("recipes")
    model = save_tiny(folder / "model", "llama", chat_template=True)
    (folder / "train").mkdir()
    for index in range(4):
        (folder / "train" / f"{index}.txt").write_text(prose(index, 300), encoding="utf-8")
    (folder / "held.txt").write_text(prose(99, 500), encoding="utf-8")
    return sections(model, folder)


def attempt(whole: dict[str, Any], tmp_path: Path, seed: int) -> None:
    """One odd recipe, half of the time with an odd `--set` as well."""
    import retrofit

    generator = random.Random(seed)
    values = edited(whole, Choices(generator.randbytes(60)), ("seed", "description", "kernel", "device"), most=3)
    recipe, out = tmp_path / f"{seed}.yaml", tmp_path / f"out{seed}"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    overrides = [f"{_path(whole, generator)}={json.dumps(generator.choice(ODD))}"] if generator.random() < 0.5 else []
    try:
        with within(SECONDS):
            retrofit.run(recipe, out=out, overrides=overrides, dry_run=True)
    except UserError as error:
        assert error.what
    except (Exception, SystemExit) as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert not out.exists(), f"seed {seed}: a dry run wrote"


def _path(values: Any, generator: random.Random) -> str:
    key = generator.choice(list(values))
    inner = values[key]
    return f"{key}.{_path(inner, generator)}" if isinstance(inner, dict) and inner and generator.random() < 0.8 else key


def test_a_few_odd_recipes(whole: dict[str, Any], tmp_path: Path) -> None:
    for seed in range(12):
        attempt(whole, tmp_path, seed)


@pytest.mark.attack
@pytest.mark.parametrize("block", range(25))
def test_odd_recipes(block: int, whole: dict[str, Any], tmp_path: Path) -> None:
    for seed in range(100 + 20 * block, 120 + 20 * block):
        attempt(whole, tmp_path, seed)
