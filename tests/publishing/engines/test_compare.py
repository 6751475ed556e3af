"""Differences of log-probabilities against plain sums, and which positions of which documents are scored."""

from __future__ import annotations

import numpy as np
import pytest

from retrofit.data.documents import Document
from retrofit.publishing.engines.compare import distance, tells
from retrofit.publishing.engines.controls import UNLIMITED, controls_of
from retrofit.publishing.engines.run import Rows
from retrofit.publishing.engines.trial import passages_of
from tests.tiny import tiny_config

REFERENCE = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32))


def rows(logprobs: np.ndarray, tokens: np.ndarray | None = None) -> Rows:
    best = logprobs.argmax(-1)
    greedy = best if tokens is None else np.take_along_axis(tokens, best[:, None], 1)[:, 0]
    return Rows(tokens, logprobs, tuple(greedy.tolist()))


def test_the_whole_vocabulary_and_its_most_probable_tokens_give_the_same_distance() -> None:
    other = REFERENCE + np.array([[0.25, 0.0, 0.0], [0.0, 0.0, -0.5]], np.float32)
    whole = distance([rows(REFERENCE)], [rows(other)])
    assert whole.largest == pytest.approx(0.5)
    assert whole.mean == pytest.approx(0.75 / 6)
    assert whole.greedy == 1.0
    top = np.argsort(-other, axis=-1)[:, :1]
    best = distance([rows(REFERENCE)], [rows(np.take_along_axis(other, top, 1), top)])
    assert best.largest == pytest.approx(0.5)
    assert best.mean == pytest.approx(0.75 / 2)


def test_another_most_probable_token_and_what_is_not_finite() -> None:
    other = REFERENCE.copy()
    other[0] = REFERENCE[0][::-1]
    assert distance([rows(REFERENCE)], [rows(other)]).greedy == 0.5
    other[1, 1] = np.nan
    assert distance([rows(REFERENCE)], [rows(other)]).largest == np.inf


def test_rows_that_an_engine_pads_the_vocabulary_with_are_left_out() -> None:
    padded = np.concatenate([REFERENCE, np.full((2, 5), -50.0, np.float32)], axis=1)
    assert distance([rows(REFERENCE)], [rows(padded)]).largest == 0.0


def test_a_control_tells_when_it_is_twenty_times_as_far() -> None:
    assert tells(0.1, 2.0)
    assert not tells(0.11, 2.0)
    assert not tells(0.0, 0.0)


def document(tokens: int) -> Document:
    return Document("x", "x", np.arange(tokens), tokens)


def test_documents_are_scored_past_the_original_window_at_both_ends() -> None:
    long, short, shortest = document(5000), document(100), document(10)
    first, second = passages_of([shortest, long, short], original=1024, window=4096)
    assert len(first.input_ids) == 1024 + 256
    assert {0, 1, 7, 1023, 1024, 1025, 1279} <= set(first.positions)
    assert len(second.input_ids) == 100
    assert second.positions[-1] == 99
    [whole] = passages_of([long], original=4096, window=4096)
    assert len(whole.input_ids) == 4095


def test_controls_leave_out_what_the_configuration_is_about() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e4, "original_max_position_embeddings": 128}
    plain = {"rope_type": "default", "rope_theta": 5e4}
    found = controls_of(tiny_config("llama", rope_parameters=yarn, max_position_embeddings=512))
    assert found == {"scaling ignored": {"rope_parameters": plain}}
    found = controls_of(tiny_config("mistral", rope_parameters=plain, sliding_window=16))
    assert found["theta lost"]["rope_parameters"]["rope_theta"] == 1e4
    assert found["window ignored"] == {"sliding_window": UNLIMITED}
    nested = controls_of(tiny_config("gemma3_text"))
    assert set(nested["theta lost"]["rope_parameters"]) == {"full_attention", "sliding_attention"}
    assert controls_of(tiny_config("gpt_bigcode")) == {"attention scale ignored": {"scale_attn_weights": False}}
