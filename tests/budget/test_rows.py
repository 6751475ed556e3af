"""The list of a budget is arithmetic: bytes, sums, what no row beats, and which rows are measured first."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from retrofit.budget.rows import (
    MEASURED,
    NOTHING,
    ORIGINAL,
    PREDICTED,
    BudgetRow,
    Heads,
    Loss,
    Stored,
    Windows,
    best,
    combinations,
    original_row,
    pareto,
)
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.recipe.kv_budget import Budget, parse_budget
from retrofit.recipe.schema import Window
from retrofit.workflow.budget_choices import choices, commands, meeting, require_possible
from tests.tiny import tiny_config

SPEC = describe(tiny_config("llama", num_hidden_layers=4, head_dim=32))
HEADS = [Heads(4, NOTHING, ORIGINAL), Heads(2, Loss(0.1, 0.3), PREDICTED), Heads(1, Loss(0.4, 1.0), MEASURED)]
WINDOWS = [Windows(None, (), NOTHING, ORIGINAL), Windows(64, (1,), Loss(0.05, 0.2), MEASURED)]
STORED = [Stored("auto", NOTHING, ORIGINAL), Stored("q8_0", Loss(0.001, -0.002), MEASURED)]


def rows() -> list[BudgetRow]:
    return combinations(SPEC, HEADS, WINDOWS, STORED, range(4), 1000, 2)


def row(nbytes: int, text: float, answers: float) -> BudgetRow:
    parts = Heads(1, Loss(text, answers), PREDICTED), WINDOWS[0], STORED[0]
    return BudgetRow(*parts, nbytes, Loss(text, answers))


def test_bytes_are_those_of_heads_windows_and_type() -> None:
    found = {(one.heads.kv_heads, one.windows.size, one.stored.cache_dtype): one.nbytes for one in rows()}
    assert len(found) == 12
    for (heads, size, kind), nbytes in found.items():
        head = {"auto": 64, "q8_0": 34}[kind]
        tokens = 4 * 1000 if size is None else 1000 + 3 * 64
        assert nbytes == 2 * heads * head * tokens


def test_a_prediction_is_the_sum_of_the_parts_and_says_so() -> None:
    found = {(one.heads.kv_heads, one.windows.size, one.stored.cache_dtype): one for one in rows()}
    whole = found[2, 64, "q8_0"]
    assert whole.predicted.text == pytest.approx(0.1 + 0.05 + 0.001)
    assert whole.predicted.answers == pytest.approx(0.3 + 0.2 - 0.002)
    assert whole.how == "sum of predicted + measured + measured"
    assert whole.measured is None
    assert found[1, None, "auto"].how == MEASURED
    assert found[4, None, "q8_0"].measured == Loss(0.001, -0.002), "nothing but the cache: it is measured as it is"
    assert found[4, None, "auto"] == original_row(found.values())


def test_what_is_kept_is_what_no_other_row_beats() -> None:
    generator = random.Random(0)
    for _ in range(50):
        every = [
            row(generator.randrange(1, 9), generator.randrange(5) / 10, generator.randrange(5) / 10) for _ in range(30)
        ]
        values = {(one.nbytes, one.loss.text, one.loss.answers) for one in every}
        front = {
            own
            for own in values
            if not any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in values)
        }
        found = [(one.nbytes, one.loss.text, one.loss.answers) for one in pareto(every)]
        assert set(found) == front
        assert len(found) == len(front)
        assert found == sorted(found, key=lambda own: -own[0])


def test_the_best_row_that_meets_the_budget_comes_first() -> None:
    every = [row(10, 0.1, 0.0), row(10, 0.0, 0.4), row(11, 0.0, 0.0), row(9, 0.0, 1.0), row(8, -0.5, 0.4)]
    found = best(every, Budget(10, 1), answer_weight=0.2)
    assert [one.nbytes for one in found] == [8, 10, 10, 9], "less than nothing is nothing, and fewer bytes win a tie"
    measured = [replace(one, measured=Loss(1.0 / one.nbytes, 0.0)) for one in found]
    assert best(measured, Budget(10, 1), 0.2)[0].nbytes == 10, "what was measured counts"


def test_a_budget_that_nothing_meets_names_the_smallest() -> None:
    found = choices(Window(size=64), tiny_config("llama", num_hidden_layers=4, head_dim=32), SPEC)
    assert set(found.counts) == {4, 2, 1}
    assert found.candidates == (0, 1, 2, 3)
    for full, tokens in (("auto", 4 * 64), (1, 1000 + 3 * 64)):  # one head, q4_0; measuring may leave no layer full
        section, least = Window(size=64, full_layers=full), 2 * 18 * tokens

        def require(budget: Budget, section: Window = section) -> None:
            require_possible(budget, section, 512, SPEC, found, 2)

        require(Budget(least, 1000))
        with pytest.raises(UserError, match="the smallest KV cache is") as caught:
            require(Budget(least - 1, 1000))
        allowed, _, shorter = str(caught.value.fix).removeprefix("allow ").partition(", or ask for at most ")
        require(parse_budget(allowed))
        assert parse_budget(allowed).length == 1000
        most = int(shorter.removesuffix(" tokens").replace(",", ""))
        require(Budget(least - 1, most))
        with pytest.raises(UserError):
            require(Budget(least - 1, most + 1))
    smallest = min(one.nbytes for one in rows())
    assert meeting(Budget(smallest, 1000), rows(), 0.2)[0].nbytes == smallest
    with pytest.raises(UserError, match=r"no row of the list meets it") as caught:
        meeting(Budget(smallest - 1, 1000), rows(), 0.2)
    assert meeting(parse_budget(str(caught.value.fix).removeprefix("allow ")), rows(), 0.2)


def test_windows_that_become_shorter_are_counted() -> None:
    config = tiny_config("gemma2", sliding_window=200, num_hidden_layers=4)
    spec = describe(config)
    found = choices(Window(size=64), config, spec)
    assert found.candidates == (1, 3)
    assert found.windowed({3}) == {0, 1, 2}
    whole, windows = Heads(4, NOTHING, ORIGINAL), [Windows(64, (3,), NOTHING, MEASURED)]
    [made] = combinations(spec, [whole], windows, STORED[:1], found.windowed(()), 1000, 2)
    assert made.nbytes == spec.with_windows(64, {0, 1, 2}).kv_cache_bytes(1000, 2)


@pytest.mark.parametrize(
    ("family", "over", "said"),
    [
        ("gpt_bigcode", {"multi_query": True, "num_key_value_heads": 1}, "no fewer KV heads"),
        ("phi", {}, "no windows in the list"),
        ("llama", {}, "no cache of q4_0 in the list: q4_0 stores blocks of 32"),
    ],
)
def test_what_a_model_cannot_have_is_left_out_and_said(family: str, over: dict[str, object], said: str) -> None:
    config = tiny_config(family, **over)
    found = choices(Window(size=64), config, describe(config))
    assert any(said in note for note in found.notes), found.notes


def test_commands_make_a_row_and_say_how_it_is_served() -> None:
    found = {(one.heads.kv_heads, one.windows.size, one.stored.cache_dtype): one for one in rows()}
    assert commands(found[4, None, "auto"], "m") == ()
    assert commands(found[4, None, "q8_0"], "m") == ("served by llama.cpp, --cache-type-k q8_0 --cache-type-v q8_0",)
    assert commands(found[4, 64, "auto"], "m") == ("retrofit window m --size 64 --full-layers 1, --out out/window64",)
    assert commands(found[2, 64, "auto"], "m", " --calibrate t") == (
        "retrofit convert m --kv-heads 2 --calibrate t --out out/kv2",
        "retrofit window out/kv2 --size 64 --full-layers 1, --calibrate t --out out/kv2-window64",
    )


def test_every_combination_is_there_once() -> None:
    found = [(one.heads, one.windows, one.stored) for one in rows()]
    assert found == list(itertools.product(HEADS, WINDOWS, STORED))
