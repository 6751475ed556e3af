"""What a run makes of itself for its model card."""

from __future__ import annotations

import pytest

from retrofit.recipe.schema import Recipe, Window
from retrofit.workflow.card import title


@pytest.mark.parametrize("base", ["someone/Tiny-1B", "Tiny-1B", "Tiny-1B.gguf", "Tiny-1B.GGUF"])
def test_a_title_says_what_was_done_to_which_model(base: str) -> None:
    recipe = Recipe.model_validate({"name": "x", "convert": {"kv_heads": 2}, "context": {"length": 16384}})
    assert title(recipe, base, 16384) == "Tiny-1B-kv2-16k"
    assert title(recipe.model_copy(update={"window": Window(size=512)}), base, 16384) == "Tiny-1B-kv2-w512-16k"
