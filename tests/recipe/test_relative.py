"""Lengths and KV heads relative to a model: as they are written, and the numbers they become."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from retrofit.errors import UserError
from retrofit.recipe.load import dump_recipe, parse
from retrofit.recipe.options import recipe_of
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.resolve import default_lengths_within, is_relative, resolved
from retrofit.recipe.schema import Recipe


def recipe(**values: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", **values})


RELATIVE: dict[str, Any] = {
    "convert": {"kv_heads": "1/4"},
    "context": {"length": "4x"},
    "recover": {"sequence_length": "0.5x", "positions": "pose", "stages": [{"length": "target", "tokens": 4096}]},
    "evaluate": {
        "lengths": "1/2x,native,target, 2k",
        "cost_lengths": ["native"],
        "needle": {"lengths": ["target"]},
        "ruler": {"lengths": ["2x"]},
    },
    "require": {"ppl_ratio@1/2x/python-docs": "<= 1.5", "tail_ppl@target": "<= 9", "task@native": ">= 0.5"},
}


def test_words_become_the_numbers_of_the_model() -> None:
    found, notes = resolved(recipe(**RELATIVE), 4096, 4096, (1, 2, 4, 8))
    assert notes == ()
    assert not is_relative(found)
    assert found.convert
    assert found.convert.kv_heads == 2
    assert found.context
    assert found.context.length == 16384
    assert found.recover
    assert (found.recover.sequence_length, found.recover.stages[0].length) == (2048, 16384)
    assert found.evaluate
    assert found.evaluate.lengths == (2048, 4096, 16384)
    assert found.evaluate.cost_lengths == (4096,)
    assert found.evaluate.needle
    assert found.evaluate.needle.lengths == (16384,)
    assert found.evaluate.ruler
    assert found.evaluate.ruler.lengths == (8192,)
    assert list(found.require) == ["ppl_ratio@2048/python-docs", "tail_ppl@16384", "task@native"]


def test_the_default_lengths_are_those_that_the_window_holds() -> None:
    usual = recipe(evaluate={})
    assert default_lengths_within(usual, 8192) == (usual, ())
    shorter, notes = default_lengths_within(usual, 4096)
    assert shorter.evaluate
    assert shorter.evaluate.lengths == (1024, 2048, 4096)
    assert notes == ("evaluate.lengths: by default 1,024, 2,048, 4,096 in a window of 4,096 tokens",)
    tiny, _ = default_lengths_within(usual, 512)
    assert tiny.evaluate
    assert tiny.evaluate.lengths == (512,)


def test_words_stay_as_written_until_then() -> None:
    written = recipe(**RELATIVE)
    assert is_relative(written)
    assert parse(dump_recipe(written), "r.yaml", Recipe) == written
    assert yaml.safe_load(dump_recipe(written))["evaluate"]["lengths"] == ["1/2x", "native", "target", 2048]


def test_a_recipe_in_numbers_stays_itself() -> None:
    written = recipe(evaluate={"lengths": [1024]})
    assert resolved(written, 64, 64, (1,))[0] is written


@pytest.mark.parametrize(("possible", "count"), [((1, 3), 1), ((1, 2, 4), 1), ((1, 2, 4, 8, 16, 32), 8), ((1,), 1)])
def test_a_share_of_the_heads_is_a_possible_number(possible: tuple[int, ...], count: int) -> None:
    found, _ = resolved(recipe(convert={"kv_heads": "1/4"}), 64, 64, possible)
    assert found.convert
    assert found.convert.kv_heads == count


def test_words_that_mean_the_same_are_told() -> None:
    found, notes = resolved(recipe(evaluate={"lengths": ["native", "target"]}), 4096, 4096, (1,))
    assert found.evaluate
    assert found.evaluate.lengths == (4096,)
    assert notes == ("evaluate.lengths: `native` and `target` are the same 4,096 tokens here",)


def test_a_target_does_not_follow_from_itself() -> None:
    with pytest.raises(UserError, match="the target is what this length says"):
        resolved(recipe(context={"length": "target"}), 4096, 4096, (1,))


def test_numbers_that_do_not_fit_together_are_told_with_the_model() -> None:
    written = recipe(recover={"sequence_length": "native", "tokens": 4096})
    with pytest.raises(RecipeError, match=r"(?s)x, for 8,192 positions and 1 KV heads.*one step reads 8192"):
        resolved(written, 8192, 8192, (1,))


@pytest.mark.parametrize("word", ["natve", "2", "x", "1/0x", "-1x", "1/4"])
def test_a_word_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(RecipeError):
        parse(yaml.safe_dump({"name": "x", "context": {"length": word if word != "2" else "2 x"}}), "r.yaml", Recipe)


@pytest.mark.parametrize("word", ["5/4", "1/0", "0/4", "native", "0.25"])
def test_a_share_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(RecipeError, match="must be a whole number"):
        parse(yaml.safe_dump({"name": "x", "convert": {"kv_heads": word}}), "r.yaml", Recipe)


def test_options_take_the_words_too() -> None:
    found = recipe_of("evaluate", {"lengths": "native,2x"})
    assert found.evaluate
    assert [str(one) for one in found.evaluate.lengths] == ["native", "2x"]
    found = recipe_of("convert", {"kv_heads": "1/4"})
    assert found.convert
    assert str(found.convert.kv_heads) == "1/4"
