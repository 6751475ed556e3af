"""The ways in which a value may be written, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from retrofit.recipe.load import dump_recipe, parse
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.schema import Adapter, Recipe, Section
from retrofit.recipe.suite import Suite


def recipe(**values: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", **values})


@pytest.mark.parametrize(
    ("written", "count"), [("32k", 32768), ("128K", 131072), ("1m", 1 << 20), ("1.5k", 1536), ("4_096", 4096), (64, 64)]
)
def test_a_length_may_be_written_in_thousands_of_1024(written: Any, count: int) -> None:
    found = recipe(context={"length": written}, evaluate={"lengths": [written], "tail": written})
    assert found.context is not None
    assert found.context.length == count
    assert found.evaluate is not None
    assert (found.evaluate.lengths, found.evaluate.tail) == ((count,), count)


@pytest.mark.parametrize("written", ["32q", "k", "1.0001k", "-4k", "1e3", "9" * 400 + "k", "", "٣k"])
def test_a_length_is_a_whole_number_of_tokens(written: str) -> None:
    with pytest.raises(RecipeError, match="must be a whole number of tokens, for example 4096 or 32k"):
        parse(yaml.safe_dump({"name": "x", "context": {"length": written}}), "r.yaml", Recipe)


def test_the_range_of_a_length_is_that_of_the_number() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.lengths\[1\]: must be at most 2147483647"):
        parse("name: x\n", "r.yaml", Recipe, ["evaluate.lengths=1k,99999m"])


def test_lengths_may_be_written_with_commas() -> None:
    found = parse("name: x\nevaluate: {cost_lengths: 512}\n", "r.yaml", Recipe, ["evaluate.lengths=1k, 4k"]).evaluate
    assert found is not None
    assert (found.lengths, found.cost_lengths) == ((1024, 4096), (512,))


@pytest.mark.parametrize(
    ("written", "name"), [("fp16", "float16"), ("half", "float16"), ("BF16", "bfloat16"), ("fp32", "float32")]
)
def test_a_dtype_is_kept_by_its_full_name(written: str, name: str) -> None:
    found = recipe(dtype=written, evaluate={"dtype": written})
    assert yaml.safe_load(dump_recipe(found))["dtype"] == name
    assert found.evaluate is not None
    assert found.evaluate.dtype == name


def test_a_dtype_that_is_none_is_told_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match="one of auto, float32, bfloat16, float16, not `bfloat`; did you mean"):
        parse("name: x\ndtype: bfloat\n", "r.yaml", Recipe)


def test_lora_alpha_is_twice_the_rank_unless_given() -> None:
    assert [Adapter(rank=8).alpha, Adapter().alpha, Adapter(rank=8, alpha=8).alpha] == [16, 128, 8]
    with pytest.raises(ValueError, match="1 validation error"):
        Adapter(rank=10**9)


def sections(kind: type[Section]) -> set[type[Section]]:
    return {kind}.union(*map(sections, kind.__subclasses__()))


@pytest.mark.parametrize("section", sorted(sections(Section) - {Section}, key=lambda kind: kind.__name__))
def test_every_key_says_what_it_is(section: type[Section]) -> None:
    assert issubclass(Suite, Section)  # it is among them
    assert [name for name, field in section.model_fields.items() if not field.description] == []
