"""Values that no step could work with are refused by the recipe language itself, with the line and the range."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from retrofit.recipe.hub import LICENSES, is_link, is_repo_id, license_problem
from retrofit.recipe.load import parse
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.schema import MOST_SEED, MOST_TOKENS, Recipe, parse_bound, parse_size


def refused(key: str, value: Any) -> str:
    """What is said of one value."""
    section, _, name = key.partition(".")
    needed = {"convert": {"kv_heads": 1}, "context": {"length": 64}}.get(section, {})
    values = {"name": "x", section: {**needed, name: value} if name else value}
    with pytest.raises(RecipeError) as caught:
        parse(yaml.safe_dump(values), "r.yaml", Recipe)
    return str(caught.value)


@pytest.mark.parametrize("seed", [-1, MOST_SEED + 1, 2**64, 10**30])
def test_seeds_are_those_that_every_generator_takes(seed: int) -> None:
    assert f"must be at {'least 0' if seed < 0 else f'most {MOST_SEED}'}" in refused("seed", seed)


@pytest.mark.parametrize(
    ("key", "value"),
    [("convert.kv_heads", True), ("recover.learning_rate", False), ("seed", True), ("evaluate.lengths", [64, True])],
)
def test_a_switch_is_no_number(key: str, value: Any) -> None:
    assert "must be a number, not true or false" in refused(key, value)


@pytest.mark.parametrize("bound", ["<= 1.2.3", "<= .", "<= 1e999", "<= nan", "== 1", "<= 1\n; x", "1", "<= -1", "<= ١"])
def test_a_bound_is_a_comparison_with_a_finite_number(bound: str) -> None:
    assert "is not a bound" in refused("require", {"ppl@64": bound})


def test_bounds_are_read_as_written() -> None:
    found = [parse_bound(text) for text in ("<= 1.5", " > 2 ", "<.5", ">= 1e-3", "<= 1.")]
    assert found == [("<=", 1.5), (">", 2.0), ("<", 0.5), (">=", 0.001), ("<=", 1.0)]


@pytest.mark.parametrize(
    "key", ["ppl_ratio@64\n", "nope@64", "ppl@" + "9" * 5000, "ppl@٦٤", "ppl@064", "task@", "ppl@64/a b"]
)
def test_a_metric_has_a_known_name(key: str) -> None:
    assert "is not a metric" in refused("require", {key: "<= 1"})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("context.theta", 1.0000000001, "at least 2"),
        ("context.theta", 1e308, "at most 1000000000000000"),
        ("context.scale", 1e308, f"at most {MOST_TOKENS}"),
        ("context.attention_factor", 1e-320, "at least 0.1"),
        ("context.attention_factor", 1e30, "at most 10"),
        ("context.beta_fast", 1e-300, "at least 0.001"),
        ("context.high_freq_factor", 1e300, "at most 1000000"),
        ("context.factor", 1e308, f"at most {MOST_TOKENS}"),
        ("recover.tokens", 10**18, "at most 1000000000000"),
        ("recover.batch_size", 10**12, "at most 65536"),
        ("recover.evals", 10**12, "at most 10000"),
        ("recover.checkpoints", 10**12, "at most 10000"),
        ("recover.row_chunk", 10**30, "at most 1048576"),
        ("recover.learning_rate", 1e300, "at most 1"),
        ("recover.learning_rate", float("inf"), "a finite number"),
        ("recover.learning_rate", 0, "at least 1e-09"),
        ("recover.weight_decay", 1e300, "at most 10"),
        ("recover.max_grad_norm", 1e-300, "at least 1e-06"),
        ("recover.adapter", {"rank": 10**9}, "at most 65536"),
        ("recover.adapter", {"dropout": 0.999}, "at most 0.9"),
        ("recover.adapter", {"attention": False, "mlp": False, "norms": True}, "the adapter sits nowhere"),
        ("recover.sequence_length", 0, "at least 16"),
        ("recover.text", [{"source": "a", "weight": 0}], "at least 1e-06"),
        ("recover.text", [{"source": "a", "weight": 1e308}], "at most 1000000"),
        ("recover.text", [{"source": ""}], "at least 1 character"),
        ("recover.text", [], "a list of at least 1"),
        ("evaluate.lengths", [16] * 101, "a list of at most 100"),
        ("evaluate.lengths", [10**30], f"at most {MOST_TOKENS}"),
        ("evaluate.resamples", 10**9, "at most 100000"),
        ("evaluate.decode_tokens", 10**12, "at most 8192"),
        ("evaluate.needle", {"lengths": [64], "depths": 10**9}, "at most 1000"),
        ("evaluate.ruler", {"lengths": [256], "samples": 10**12}, "at most 10000"),
        ("convert.kv_heads", 10**30, "at most 65536"),
        ("name", "a" * 101, "at most 100 characters"),
        ("name", "..", "text matching"),
        ("name", "a\n", "text matching"),
        ("publish.max_shard_size", "0.1B", "at least 1000 bytes"),
        ("publish.max_shard_size", "1e999GB", "not a size"),
        ("publish.max_shard_size", "-5GB", "not a size"),
        ("publish.license", "apache2", "did you mean `apache-2.0`?"),
        ("publish.license", "mit\n", "not a license id"),
        ("publish.license", "unknown", "not a license id"),
        ("publish.license_link", "javascript:alert(1)", "no address"),
        ("publish.license_name", "a\nb: c", "one line of plain text"),
        ("publish.base_model", "a/b\n", "not a hub id"),
        ("publish.base_model", "../..", "not a hub id"),
        ("publish", {"license": "mit", "license_name": "x"}, "belong to `license: other`"),
    ],
)
def test_what_no_step_could_work_with_is_refused(key: str, value: Any, said: str) -> None:
    told = refused(key, value)
    assert said in told
    assert told.startswith("1 problem ")


def test_sizes_are_powers_of_ten() -> None:
    assert [parse_size(text) for text in ("5GB", "500 mb", "1.5KB", "0.1B", "x")] == [
        5 * 10**9,
        5 * 10**8,
        1500,
        0,
        None,
    ]


def test_the_range_stands_in_the_schema() -> None:
    seed = Recipe.model_json_schema()["properties"]["seed"]
    assert (seed["minimum"], seed["maximum"]) == (0, MOST_SEED)


def test_the_license_other_needs_name_and_link() -> None:
    assert "needs a name and a link" in str(license_problem("other", "tiny-1", None))
    assert license_problem("other", "tiny-1", "https://example.org/LICENSE") is None


def test_every_id_of_the_hub_is_a_license_of_its_own() -> None:
    assert [one for one in LICENSES - {"other"} if license_problem(one)] == []


def test_repositories_are_named_as_the_hub_allows() -> None:
    names = ("a/b", "A-1/b.c_d", "a", "a/b/c", "a/..", "a--b/c", "a/b.git", "é/b", "a/b\n")
    assert [name for name in names if is_repo_id(name)] == ["a/b", "A-1/b.c_d"]


def test_a_license_link_is_an_address_or_a_file_of_the_repository() -> None:
    links = ("https://a.org/x?y=1", "LICENSE", "../x", "https://a.org/ x", "file:///etc/passwd", "a\nb")
    assert [link for link in links if is_link(link)] == ["https://a.org/x?y=1", "LICENSE"]
