"""The choice of full layers, on made-up losses that add up, or depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from retrofit.windows.ablation import Variant
from retrofit.windows.choice import CHALLENGERS, ROUNDS, choose
from retrofit.windows.outcome import Choice, Limits, Rise

LIMITS = Limits(text=0.02, answers=0.1)


class Losses:
    """Losses of variants by a formula, and what was asked."""

    def __init__(self, rise: Callable[[Variant], Rise]) -> None:
        self.rise, self.asked = rise, list[Sequence[Variant]]()

    def __call__(self, variants: Sequence[Variant]) -> list[Rise]:
        self.asked.append(variants)
        return [self.rise(variant) for variant in variants]


def sums(text: dict[int, float], answers: dict[int, float]) -> Callable[[Variant], Rise]:
    def rise(windowed: Variant) -> Rise:
        return Rise(0.0, sum(text.get(i, 0.001) for i in windowed), sum(answers.get(i, 0.0) for i in windowed))

    return rise


def test_layers_whose_windows_cost_text_or_answers_see_everything() -> None:
    losses = Losses(sums({3: 0.05}, {7: 1.0, 9: 0.2}))
    found = choose(range(12), losses, LIMITS)
    assert found.full == (3, 7, 9)
    assert found.rise.answers == 0
    assert found.rise.far == pytest.approx(0.009)
    assert found.ranking[:3] == (7, 3, 9)
    assert len(losses.asked) == 2, "the second round changes nothing"
    assert len(losses.asked[0]) == 1 + 12
    assert len(losses.asked[1]) == 1 + 3 + 9


@pytest.mark.parametrize(("full", "expected"), [(0, ()), (1, (7,)), (2, (3, 7)), (4, (0, 3, 7, 9))])
def test_so_many_layers_as_are_asked_for(full: int, expected: tuple[int, ...]) -> None:
    found = choose(range(12), Losses(sums({3: 0.05}, {7: 1.0, 9: 0.2})), LIMITS, full=full)
    assert found.full == expected


def test_a_layer_that_only_matters_once_others_have_windows_is_found_in_the_second_round() -> None:
    def rise(windowed: Variant) -> Rise:  # either of 4 and 5 finds the answer
        return Rise(0.0, 0.0, 2.0 if {4, 5} <= windowed else 0.0)

    losses = Losses(rise)
    found = choose(range(8), losses, LIMITS)
    assert found.rise.answers == 0 or {4, 5} & set(found.full)
    assert found.rounds[0].added[4].answers == 0
    assert found.rounds[1].added[4].answers == 2


def test_both_layers_of_a_pair_that_only_work_together_are_found_at_once() -> None:
    found = choose(range(8), Losses(lambda w: Rise(0.0, 0.0, 2.0 if {2, 6} & w else 0.0)), LIMITS)
    assert found.full == (2, 6)


def test_later_rounds_ask_the_layers_that_cost_most_before() -> None:
    text = {layer: 0.0001 * layer for layer in range(40)}
    losses = Losses(sums(text, {39: 1.0}))
    choose(range(40), losses, LIMITS)
    given_back = {next(iter(set(losses.asked[1][0]) - v)) for v in losses.asked[1][1:] if len(v) < 39}
    assert given_back == set(range(39 - CHALLENGERS, 39))


def test_a_choice_that_never_settles_ends_and_is_measured() -> None:
    state = {"turn": 0}

    def measure(variants: Sequence[Variant]) -> list[Rise]:
        state["turn"] += 1
        odd = state["turn"] % 2
        return [Rise(0.0, 0.0, sum(1.0 for i in v if i % 2 == odd)) for v in variants]

    found: Choice = choose(range(4), measure, LIMITS, full=2)
    assert len(found.rounds) <= ROUNDS
    assert state["turn"] <= ROUNDS + 1
