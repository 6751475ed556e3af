"""What synthetic tests are hidden in: prose as tokens of the model's own tokenizer, cut where sentences end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrofit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Wording:
    """The words of a test: `opening`, then the haystack with `fact` in it, then `question`, which `answer` answers."""

    opening: str
    fact: str
    question: str
    answer: str


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a piece, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def filler(tokenizer: PreTrainedTokenizerBase, prose: str, tokens: int) -> list[int]:
    """`tokens` tokens of prose as one paragraph, from its beginning again when it ends.

    Raises: UserError for a text without words.
    """
    text = re.sub(r"\s+", " ", prose).strip()
    if not text:
        raise UserError("a haystack needs prose", where="needle", fix="name a text with words in it")
    # A tokenizer works through megabytes; no token is longer than some hundred characters, most have four.
    ids = encode(tokenizer, text[: 20 * tokens + 1000])
    if len(ids) < tokens and len(text) > 20 * tokens + 1000:
        ids = encode(tokenizer, text)
    return (ids * -(-tokens // len(ids)))[:tokens]


def boundaries(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> np.ndarray:
    """Positions in `ids` just after the end of a sentence; every position when no sentence ends."""
    unique = {token: str(tokenizer.decode([token])) for token in set(ids)}
    stops = {token for token, text in unique.items() if re.search(r"[.!?]$", text)}
    found = np.array([i + 1 for i, token in enumerate(ids) if token in stops], np.int64)
    return found if len(found) else np.arange(len(ids) + 1)
