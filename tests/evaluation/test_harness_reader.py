"""Batches of the harness, as it puts them together."""

from __future__ import annotations

from retrofit.evaluation.tasks.harness_reader import Tokenized, batches


def request(context: list[int], continuation: list[int]) -> Tokenized:
    return ("", ""), context, continuation


def test_batches_go_from_the_longest_down() -> None:
    requests = [request([1], [2]), request([1, 2, 3], [4, 5]), request([7, 8], [9])]
    assert batches(requests, 1) == [[1], [2], [0]]
    assert batches(requests, 2) == [[1, 2], [0]]


def test_requests_that_differ_in_their_last_token_are_read_once() -> None:
    requests = [request([1, 2], [3]), request([5], [6]), request([1, 2], [4])]
    assert batches(requests, 1) == [[0, 2], [1]]
