"""How the model's own samples are asked for in a recipe: `self` with its settings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from retrofit.recipe.recovery import Recover
from retrofit.recipe.schema import Calibration, Recipe, TextSource
from retrofit.workflow.samples import MOST_SAMPLED, held_out_tokens, sampled_in, train_tokens


def test_settings_are_kept_and_recorded() -> None:
    text = {"source": "self", "weight": 3, "tokens": "200k", "temperature": 0.8, "top_p": 0.9, "prompts": ["a.txt"]}
    recorded = TextSource.model_validate(text).model_dump(mode="json")
    assert {key: recorded[key] for key in ("tokens", "temperature", "top_p", "prompt_share")} == {
        "tokens": 204_800,
        "temperature": 0.8,
        "top_p": 0.9,
        "prompt_share": 0.5,
    }
    assert [prompt["source"] for prompt in recorded["prompts"]] == ["a.txt"]
    assert TextSource.model_validate(recorded) == TextSource.model_validate(text)
    assert set(TextSource(source="python-docs").model_dump()) == {"source", "weight", "field", "split"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0}, "greater than or equal to 0.001"),
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.01}, "less than or equal to 1"),
        ({"prompt_share": 0}, "greater than 0"),
        ({"tokens": 10}, "greater than or equal to 256"),
        ({"prompts": ["self"]}, "other text than `self`"),
        ({"source": "python-docs", "prompts": ["python-stdlib"]}, "only the source `self` has `prompts`"),
        ({"source": "a.txt", "temperature": 0.5}, "only the source `self` has `temperature`"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TextSource.model_validate({"source": "self", **changed})


def test_default_mixes_of_calibration_and_training_differ() -> None:
    assert {text.source: text.weight for text in Calibration().text} == {
        "python-docs": 1,
        "python-stdlib": 1,
        "self": 1,
    }
    assert {text.source: text.weight for text in Recover().text} == {"python-docs": 1, "python-stdlib": 1, "self": 2}


def test_every_sample_is_counted_in_one_step() -> None:
    values: dict[str, Any] = {"name": "x", "convert": {"kv_heads": 1}, "recover": {"tokens": 200_000}, "evaluate": None}
    recipe = Recipe.model_validate(values)
    assert train_tokens(recipe) == 125_000
    assert sampled_in(recipe, "convert") == 125_000
    assert sampled_in(recipe, "recover") == held_out_tokens(recipe) == 5_120
    other = {"tokens": 200_000, "text": [{"source": "self", "temperature": 0.7, "tokens": 60_000}]}
    recipe = Recipe.model_validate({**values, "recover": other})
    assert sampled_in(recipe, "recover") == 60_000 + held_out_tokens(recipe)
    large = Recipe.model_validate({**values, "convert": None, "recover": {"tokens": 10**9, "allow_repeats": True}})
    assert sampled_in(large, "recover") == MOST_SAMPLED + held_out_tokens(large)
    assert sampled_in(large, "convert") == 0
