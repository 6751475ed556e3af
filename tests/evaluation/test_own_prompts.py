"""Tasks that make their own prompts: which those are, and a limit that would leave the first of several lengths."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from retrofit.errors import UserError
from retrofit.evaluation.tasks.own_prompts import makes_prompts, require_all_lengths


def task(*lengths: int, own: bool = True) -> SimpleNamespace:
    """Three prompts of each length, as the harness makes 500."""
    prompts = [{"input": "x", "max_length": length} for length in lengths for _ in range(3)]
    return SimpleNamespace(config=SimpleNamespace(custom_dataset=(lambda: None) if own else None), eval_docs=prompts)


def test_tasks_with_a_function_for_their_data_make_their_prompts() -> None:
    assert makes_prompts(task(4096))
    assert not makes_prompts(task(4096, own=False))
    assert not makes_prompts(SimpleNamespace(config=SimpleNamespace()))


def test_a_limit_that_leaves_one_of_several_lengths_is_refused() -> None:
    with pytest.raises(UserError, match=r"of `niah` are of 4,096 tokens only, not of 4,096 and 16,384"):
        require_all_lengths("niah", [task(4096, 16384)], 3)


@pytest.mark.parametrize(("lengths", "limit"), [((4096,), 1), ((4096, 16384), 4), ((4096, 16384), None)])
def test_a_limit_that_asks_every_length_is_not(lengths: tuple[int, ...], limit: int | None) -> None:
    require_all_lengths("niah", [task(*lengths)], limit)


def test_other_tasks_may_have_lengths_of_any_kind() -> None:
    require_all_lengths("mine", [task(1, 2, own=False)], 1)
