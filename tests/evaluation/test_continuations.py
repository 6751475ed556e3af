"""Continuations are those of transformers' own greedy generation, of the same prompts for every model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrofit.data.documents import Document
from retrofit.evaluation.continuations import PROMPT_TOKENS, PROMPTS, continuations
from retrofit.evaluation.tasks.haystack import encode
from tests.tiny import EOS_ID, tiny_model, tiny_tokenizer

BOOK = Document("book.txt", "book", np.array(encode(tiny_tokenizer(), "A river runs through it. " * 4), np.int64), 100)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_token_is_the_likeliest_of_one_plain_pass(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    found = continuations(model, tokenizer, [BOOK], tokens=8)
    assert [one.source for one in found] == ["", "", "book.txt"]
    assert [one.prompt for one in found] == [*PROMPTS, tokenizer.decode(BOOK.input_ids[:PROMPT_TOKENS])]
    encoded = [[tokenizer.bos_token_id, *encode(tokenizer, prompt)] for prompt in PROMPTS]
    for one, ids in zip(found, [*encoded, BOOK.input_ids[:PROMPT_TOKENS].tolist()], strict=True):
        written: list[int] = []
        with torch.inference_mode():
            for _ in range(8):
                written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        assert one.text == tokenizer.decode(written, skip_special_tokens=True)
        assert one.tokens == 8


def test_a_text_that_ends_is_no_longer() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    written = continuations(model, tokenizer, [], tokens=8)[0]
    model.generation_config.eos_token_id = [EOS_ID, *range(256)]
    assert written.tokens == 8
    assert continuations(model, tokenizer, [], tokens=8)[0].tokens == 1


def test_a_prompt_longer_than_the_learned_positions_is_left_out() -> None:
    model, tokenizer = tiny_model("gpt_bigcode", max_position_embeddings=64), tiny_tokenizer()
    (only,) = continuations(model, tokenizer, [BOOK], tokens=40)
    assert only.source == "book.txt"
    assert only.tokens == 64 - PROMPT_TOKENS + 1


def test_none_are_written_where_none_are_asked_for() -> None:
    assert continuations(tiny_model("llama"), tiny_tokenizer(), [BOOK], tokens=0) == ()
