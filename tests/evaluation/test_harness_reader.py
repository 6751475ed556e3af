"""Batches of the harness, as it puts them together."""

from __future__ import annotations

import pytest

from retrofit.evaluation.tasks.harness_reader import Lengths, Prompts, Tokenized, batches


def request(context: list[int], continuation: list[int]) -> Tokenized:
    return ("", ""), context, continuation


def test_batches_go_from_the_longest_down() -> None:
    requests = [request([1], [2]), request([1, 2, 3], [4, 5]), request([7, 8], [9])]
    assert batches(requests, 1) == [[1], [2], [0]]
    assert batches(requests, 2) == [[1, 2], [0]]


def test_requests_that_differ_in_their_last_token_are_read_once() -> None:
    requests = [request([1, 2], [3]), request([5], [6]), request([1, 2], [4])]
    assert batches(requests, 1) == [[0, 2], [1]]


def encode(text: str) -> list[str]:
    """Two characters a token."""
    return [text[i : i + 2] for i in range(0, len(text), 2)]


@pytest.mark.parametrize(
    ("arguments", "long"),
    [
        (("a" * 19, "bbb"), False),  # 11 tokens, the last of which is predicted and not read
        (("a" * 20, "bbb"), True),
        (("a" * 12, {"max_gen_toks": 4}), False),
        (("a" * 14, {"max_gen_toks": 4}), True),
        (("a", {}), True),  # 256 tokens may be generated
        (("a" * 1000,), False),  # read in windows
    ],
)
def test_which_requests_are_too_long(arguments: tuple[object, ...], long: bool) -> None:
    assert Lengths(Prompts(10), encode).too_long(arguments) is long


def test_a_long_question_is_cut_or_not_asked() -> None:
    sample = {"arguments": [("a" * 40, "b"), ("a", "b")]}
    whole, cut = Lengths(Prompts(10, whole=True), encode), Lengths(Prompts(10), encode)
    assert whole.skipped(sample)
    assert not cut.skipped(sample)
    assert cut.cut_to(sample) == 10
    assert cut.cut_to({"arguments": [("a", "b")]}) is None
