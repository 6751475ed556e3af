"""Recipes: every problem at once with its line, overrides before validation, and a round trip through YAML."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from retrofit import bundled
from retrofit.errors import UserError
from retrofit.recipe.load import dump_recipe, load_recipe, load_suite, parse
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.schema import LONGEST_DESCRIPTION, Recipe

BAD = """\
name: x
modle: foo
convert:
  kv_head: 1
  method: calibratd
  kv_heads: two
recover:
  adapter: {rnk: 3}
  kv_heads: 3
evaluate:
  lengths: [1, 2048]
  lengths: [4]
"""


def problems(text: str, *overrides: str) -> dict[str, tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", Recipe, overrides)
    return {problem.key: (problem.where, problem.what) for problem in caught.value.problems}


def test_all_problems_are_reported_at_once_each_with_its_line() -> None:
    found = problems(BAD)
    assert found["modle"] == ("r.yaml:2", "unknown key; did you mean `model`?")
    assert found["convert.kv_head"] == ("r.yaml:4", "unknown key; did you mean `kv_heads`?")
    assert found["convert.method"][0] == "r.yaml:5"
    assert "did you mean `calibrated`?" in found["convert.method"][1]
    assert found["convert.kv_heads"] == ("r.yaml:6", "must be a whole number, not `two`")
    assert found["recover.adapter.rnk"] == ("r.yaml:8", "unknown key; did you mean `rank`?")
    assert found["evaluate.lengths[0]"] == ("r.yaml:11", "must be at least 16, not `1`")
    assert found["evaluate.lengths"] == ("r.yaml:12", "given twice, first in line 11")


def test_a_key_of_another_section_is_named_with_its_path() -> None:
    assert problems(BAD)["recover.kv_heads"][1] == "unknown key; did you mean `convert.kv_heads`?"


def test_a_missing_key_points_at_its_section() -> None:
    assert problems("name: x\nconvert:\n  method: mean\n")["convert.kv_heads"] == ("r.yaml:2", "is required")


def test_values_that_contradict_each_other_are_refused() -> None:
    assert "exactly one" in problems("name: x\ncontext: {length: 64, factor: 2}\n")["context"][1]
    assert "needs `evaluate`" in problems("name: x\nevaluate: null\nrequire: {'ppl@64': '<= 2'}\n")[""][1]
    allowed = parse("name: x\nrequire: {effective_length: '>= 16384'}\n", "r.yaml", Recipe, ())
    assert dict(allowed.require) == {"effective_length": ">= 16384"}
    assert "not a metric" in problems("name: x\nrequire: {perplexity: '<= 2'}\n")["require"][1]


@pytest.mark.parametrize("text", ["name: [x", "- a\n- b\n", "just words", "name: x\n\tmodel: y\n"])
def test_what_is_no_mapping_is_refused_with_a_line(text: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:\d"):
        parse(text, "r.yaml", Recipe)


def test_overrides_are_laid_over_the_file_before_it_is_validated() -> None:
    text = "name: x\nconvert: {kv_heads: two}\nrecover: null\n"
    overrides = ["convert.kv_heads=2", "recover.tokens=2048", "evaluate.lengths=[64, 32]"]
    overrides += ["require.ppl@64=<= 3", "require.kv_ratio=>= 2"]
    recipe = parse(text, "r.yaml", Recipe, overrides)
    assert recipe.convert is not None
    assert recipe.convert.kv_heads == 2
    assert recipe.recover is not None
    assert recipe.recover.tokens == 2048
    assert recipe.evaluate is not None
    assert recipe.evaluate.lengths == (32, 64)
    assert recipe.require == {"ppl@64": "<= 3", "kv_ratio": ">= 2"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recover.text=python-docs", "must be a list, such as [python-docs], not `python-docs`"),
        ("require=null", "must be a section (key: value), not `null`"),
    ],
)
def test_a_value_of_the_wrong_shape_is_shown_in_the_right_one(override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gqa", [override])
    assert says in str(caught.value)


def test_an_override_that_contradicts_the_file_is_told_how_to_take_a_key_out() -> None:
    with pytest.raises(RecipeError, match=r"exactly one of .*; --set context\.KEY=null takes a key out"):
        load_recipe("extend-4x", ["context.length=64k"])
    assert load_recipe("extend-4x", ["context.length=64k", "context.factor=null"]).context is not None


def test_a_description_does_not_hide_what_overrides_changed() -> None:
    plain = load_recipe("extend-4x")
    assert load_recipe("extend-4x", ["evaluate.documents=1"]).description == plain.description
    changed = load_recipe("extend-4x", ["context.factor=2", "context.method=yarn", "seed=1"])
    assert changed.description == f"{plain.description}; changed: context.factor=2, context.method=yarn"


def test_a_description_with_what_was_changed_is_still_one(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"name: x\ndescription: {'d' * LONGEST_DESCRIPTION}\nconvert: {{kv_heads: 1}}\n")
    changed = load_recipe(file, ["convert.kv_heads=2"])
    assert len(changed.description) == LONGEST_DESCRIPTION
    assert changed.description.endswith("d...; changed: convert.kv_heads=2")
    file.write_text(dump_recipe(changed))
    assert load_recipe(file, ["convert.kv_heads=2"]) == changed


def test_an_override_reaches_an_item_of_a_list_and_removes_a_section() -> None:
    text = "name: x\nevaluate: {text: [a.txt, b.txt]}\nconvert: {kv_heads: 1}\n"
    recipe = parse(text, "r.yaml", Recipe, ["evaluate.text.1=c.txt", "convert=null"])
    assert recipe.evaluate is not None
    assert [source.source for source in recipe.evaluate.text] == ["a.txt", "c.txt"]
    assert recipe.convert is None


def test_errors_in_overrides_name_the_option() -> None:
    found = problems("name: x\n", "recover.tokens=many", "evaluate.chunck=3")
    assert found["recover.tokens"] == (
        "--set recover.tokens=many",
        "must be a whole number of tokens, for example 4096 or 32k, not `many`",
    )
    assert found["evaluate.chunck"][1] == "unknown key; did you mean `chunk`?"
    with pytest.raises(RecipeError, match=r"write --set a\.b=value"):
        parse("name: x\n", "r.yaml", Recipe, ["recover"])
    with pytest.raises(RecipeError, match="is no index"):
        parse("name: x\nevaluate: {text: [a]}\n", "r.yaml", Recipe, ["evaluate.text.7=b"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=&a [*a]", "has no end"),
        ("seed=" + "[" * 5000, "nested more than"),
        ("seed=!!python/name:os.system", "is not read"),
        ("seed=2024-99-99", "is no date"),
        ("seed=" + "9" * 5000, "has 5,000 digits"),
        ("seed=0b_", "is no whole number"),
        ("seed=010", "octal"),
        ("convert={kv_heads: 1, kv_heads: 2}", "given twice"),
        ("description=\udcff", "is not allowed"),
        ("descr\x1biption=a", "write --set a.b=value"),
        ("x." * 2000 + "y=1", "no key has 2,001 parts"),
        ("a" * 5000 + "=1", "unknown key"),
        ("evaluate.lengths.²=64", "`²` is no index"),
        ("evaluate.lengths.٠=64", "is no index"),
        ("evaluate.lengths." + "9" * 5000 + "=64", "is no index"),
    ],
)
def test_an_override_is_read_within_the_limits_of_a_file(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)) as caught:
        parse("name: x\nevaluate: {lengths: [64], text: [a]}\n", "r.yaml", Recipe, [override])
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("name: x\n".encode("utf-16"), "is not UTF-8"),
        (b"name: x\ndescription: caf\xe9\n", "r.yaml:2: r.yaml is not UTF-8"),
        ("name: x\n".encode("utf-16-le"), r"r.yaml:1: not YAML: the character \x00"),
        (b"name: x\nseed: 0b_\nkernal: a\nseed: 5\n", "r.yaml:2: seed: `0b_` is no whole number"),
        (b"x: 1\n" * 3 + b"name: x\n", "r.yaml:3: x: given twice"),
        (b'name: "a\\u202eb"\n', r"`a\u202eb`"),
        (b"x" * (2 << 20), "more than 1,048,576 are not read"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_with_its_line(written: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(written)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert says in str(caught.value)


def test_a_recipe_with_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("\ufeffname: x\r\ndescription: é\r\n".encode())
    assert load_recipe(tmp_path / "r.yaml").description == "é"


def test_endless_problems_are_counted_and_not_told() -> None:
    with pytest.raises(RecipeError, match="and 1,980 more") as caught:
        parse("name: x\n" + "".join(f"k{i}: 1\n" for i in range(2000)), "r.yaml", Recipe)
    assert len(caught.value.problems) == 2000


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a\0b", "no NUL"),
        ("x" * 300, "too long"),
        ("~nosuchuser/r.yaml", "nobody's home folder"),
        ("loop", "loop of symbolic links"),
        ("dangling", "links to nowhere"),
        ("pipe", "is a pipe"),
        ("folder", "holds no recipe.yaml"),
        ("\udcff.yaml", "not valid UTF-8"),
        ("quickstrat", "did you mean `quickstart`"),
        ("\x1b[31m", r"no recipe `\x1b[31m`"),
        ("absent.yaml", "no recipe file"),
    ],
)
def test_names_that_are_no_recipe(name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=re.escape(says)):
        load_recipe(name)


def test_the_model_option_wins_over_the_file() -> None:
    assert load_recipe("quickstart", model="some/model").model == "some/model"


@pytest.mark.parametrize(
    "name", ["chat-gqa", "extend-4x", "extend-long", "gqa", "gqa-long", "kernel-only", "mqa", "quickstart", "window"]
)
def test_every_bundled_recipe_is_valid_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    text = dump_recipe(recipe)
    assert parse(text, "again.yaml", Recipe) == recipe
    assert "warmup_ratio: 0.05" in text or recipe.recover is None


def test_the_catalogue_is_the_folder() -> None:
    known = {"chat-gqa", "extend-4x", "extend-long", "gqa", "gqa-long", "kernel-only", "mqa", "quickstart", "window"}
    assert known <= set(bundled.names("recipes"))
    catalogue = (bundled.folder("recipes") / "README.md").read_text()
    assert all(f"`{name}`" in catalogue for name in bundled.names("recipes"))


@pytest.mark.parametrize("name", bundled.names("suites"))
def test_every_bundled_suite_is_an_evaluation(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.evaluation().lengths == suite.lengths


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("quikstart")
    assert caught.value.fix is not None
    assert "did you mean `quickstart`?" in caught.value.fix
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe(tmp_path / "missing.yaml")


def test_a_run_folder_means_the_recipe_it_was_made_with(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: kept\n")
    assert load_recipe(tmp_path).name == "kept"
