"""The table of engines is about this program's families and methods, and is read by what a configuration says."""

from __future__ import annotations

from typing import Any

import pytest

from evals.engines.__main__ import ENGINES
from evals.engines.cases import ONLY, REAL, cases
from evals.engines.table import render
from retrofit import bundled
from retrofit.context import engines, rope
from retrofit.context.engines import (
    EXPERTS,
    HEADS,
    NORMALISED,
    TWO_LISTS,
    WRITTEN,
    Subject,
    Tried,
    differences,
    subject_of,
    tried,
    unread,
)
from retrofit.context.fields import as_dict
from retrofit.context.lint import lint
from retrofit.recipe.engines import ENGINES as NAMES
from retrofit.recipe.schema import RopeSettings
from tests.tiny import FAMILIES, tiny_config

ROW = {
    "environment": "vllm",
    "engine": "vllm",
    "version": "1",
    "window": False,
    "source": None,
    "mean": 0.0,
    "greedy": 1.0,
}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one release of vLLM and one of llama.cpp, on llama alone."""
    rows = [
        {
            **ROW,
            "family": "llama",
            "method": HEADS,
            "verdict": "same",
            "difference": 1e-6,
            "control": 2.0,
            "message": "",
        },
        {
            **ROW,
            "family": "llama",
            "method": "ntk",
            "verdict": "same",
            "difference": 1e-6,
            "control": 2.0,
            "message": "",
        },
        {
            **ROW,
            "family": "llama",
            "method": "yarn",
            "verdict": "differs",
            "difference": 2.0,
            "control": 2.0,
            "message": "scaling ignored",
        },
        {
            **ROW,
            "engine": "llama.cpp",
            "family": "llama",
            "method": "yarn",
            "verdict": "error",
            "difference": None,
            "control": 2.0,
            "message": "no",
        },
    ]
    monkeypatch.setattr(engines, "table", lambda: {"rows": rows})
    engines._rows.cache_clear()
    yield
    engines._rows.cache_clear()


def test_the_table_is_about_the_families_and_methods_that_there_are() -> None:
    found: dict[str, set[Any]] = {}
    for row in engines.table()["rows"]:
        place = (row["family"], row["method"], row["window"], row["source"])
        found.setdefault(row["environment"], set()).add(place)
    every = {(case.family, case.method, case.window, case.source) for case in cases()}
    assert set(found) <= set(ENGINES)
    assert set().union(*found.values()) - every == set()
    wanted = {place for place in every if place[3] != REAL}
    for name in ENGINES:
        assert wanted - found[name] == set(), name


def test_the_page_says_not_tried_where_a_row_is_missing() -> None:
    rows = engines.table()["rows"]
    environments = {row["environment"] for row in rows}
    missing = len({(row["family"], row["method"], row["window"], row["source"]) for row in rows}) * len(environments)
    page = (bundled.folder("results") / "engines.md").read_text()
    cells = [cell for line in page.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert sum(cell.strip() == "not tried" for cell in cells) == missing - len(rows)


def test_the_page_is_the_table() -> None:
    assert (bundled.folder("results") / "engines.md").read_text() == render(engines.table())


def test_what_is_the_same_is_a_twentieth_of_its_control() -> None:
    for row in engines.table()["rows"]:
        if row["verdict"] == "same":
            assert row["control"] >= 20 * row["difference"]


def test_every_engine_of_a_recipe_can_be_made() -> None:
    assert set(NAMES) - {"transformers"} <= set(bundled.names("engines"))
    assert set(ENGINES) <= set(bundled.names("engines"))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONLY])
@pytest.mark.parametrize("method", ["ntk", "yarn", "llama3", "linear"])
def test_an_extended_configuration_is_known_by_its_method(family: str, method: str) -> None:
    config = tiny_config(family, **({"norm_topk_prob": NORMALISED[family]} if family in NORMALISED else {}))
    assert subject_of(config) == Subject(family, HEADS, False)
    longer = rope.extend_fields(as_dict(config), factor=4, method=method)
    assert subject_of(longer) == Subject(family, method, False)


def test_lists_of_phi3_that_no_method_writes_are_longrope() -> None:
    config = tiny_config("phi3", original_max_position_embeddings=512)
    long = tuple(1 + 3 * (index / 7) ** 0.1 for index in range(8))
    for short, method in ((long, "longrope"), ((1.0,) * 8, TWO_LISTS)):
        settings = RopeSettings(short_factor=short, long_factor=long)
        longer = rope.extend_fields(as_dict(config), factor=4, method="longrope", settings=settings)
        assert subject_of(longer) == Subject("phi3", method, False)


def test_lists_and_written_factors_are_known() -> None:
    config = tiny_config("llama")
    for short, method in (([2.0] * 8, "longrope"), ([1.0] * 8, TWO_LISTS)):
        settings = RopeSettings(short_factor=tuple(short), long_factor=(2.0,) * 8)
        longer = rope.extend_fields(as_dict(config), factor=4, method="longrope", settings=settings)
        assert subject_of(longer) == Subject("llama", method, False)
    yarn = rope.extend_fields(as_dict(config), factor=4, method="yarn")
    for name in ("rope_parameters", "rope_scaling"):
        yarn[name] = {**yarn[name], "attention_factor": 1.4}
    assert subject_of(yarn) == Subject("llama", WRITTEN, False)
    assert subject_of({}) is None


def test_sliding_windows_are_told_apart_where_a_family_may_lack_them() -> None:
    assert subject_of(tiny_config("mistral", sliding_window=16)) == Subject("mistral", HEADS, True)
    assert subject_of(tiny_config("gemma2")) == Subject("gemma2", HEADS, False)
    assert subject_of(tiny_config("qwen2", sliding_window=16)) == Subject("qwen2", HEADS, False)


@pytest.mark.parametrize(("family", "usual"), [("qwen2_moe", False), ("qwen3_moe", True), ("olmoe", False)])
def test_experts_whose_weights_are_normalised_otherwise_than_usual_are_known(family: str, usual: bool) -> None:
    for norm in (True, False):
        assert subject_of(tiny_config(family, norm_topk_prob=norm)) == Subject(family, HEADS, False, norm != usual)
    silent = {key: value for key, value in as_dict(tiny_config(family)).items() if key != "norm_topk_prob"}
    assert subject_of(silent) == Subject(family, HEADS, False, usual)


def test_experts_are_a_row_beside_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {**ROW, "family": "qwen3_moe", "verdict": "same", "difference": 1e-6, "control": 2.0, "message": ""}
    other = {**same, "verdict": "differs", "difference": 0.4, "message": "expert weights normalised"}
    rows = [{**same, "method": HEADS}, {**same, "method": "yarn"}, {**other, "method": EXPERTS}]
    monkeypatch.setattr(engines, "table", lambda: {"rows": rows})
    engines._rows.cache_clear()
    try:
        usual, unusual = (tiny_config("qwen3_moe", norm_topk_prob=norm) for norm in (True, False))
        assert [one.verdict for one in tried(usual)] == ["same"]
        assert tried(unusual) == (Tried("vllm", "1", "differs", 0.4, 2.0, "expert weights normalised"),)
        longer = rope.extend_fields(as_dict(unusual), factor=4, method="yarn")
        for config in (unusual, longer):
            [one] = differences(config)
            assert "on a tiny qwen3_moe with norm_topk_prob false a log-probability is 0.4 nats away" in one.text
            assert one.fix == "serve it with another engine"
        assert not differences(rope.extend_fields(as_dict(usual), factor=4, method="yarn"))
    finally:
        engines._rows.cache_clear()


@pytest.mark.usefixtures("made_up")
def test_what_was_not_run_is_not_tried() -> None:
    longer = rope.extend_fields(as_dict(tiny_config("llama")), factor=4, method="llama3")
    assert tried(longer) == (Tried("vllm", "1", "not tried"), Tried("llama.cpp", "1", "not tried"))
    assert {one.verdict for one in tried(tiny_config("qwen2"))} == {"not tried"}


@pytest.mark.usefixtures("made_up")
def test_what_an_engine_computes_otherwise_is_a_warning_with_a_method_that_it_does_compute() -> None:
    longer = rope.extend_fields(as_dict(tiny_config("llama")), factor=4, method="yarn")
    [one] = differences(longer)
    assert "vllm 1 computes something else (scaling ignored)" in one.text
    assert one.fix == "for vllm use ntk"
    assert [finding.rule for finding in lint(longer)] == ["engine-differs"]
    assert unread(longer) == {"vllm", "llama.cpp"}
    assert not differences(rope.extend_fields(as_dict(tiny_config("llama")), factor=4, method="ntk"))
