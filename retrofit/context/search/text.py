"""What the passes of a search read: one text with facts put into it, its middle left out, read cheaply or in full."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrofit.context.search.candidates import NEAR, TAIL
from retrofit.evaluation.tasks.haystack import encode
from retrofit.evaluation.tasks.needle import DIGITS, KEYS, NEEDLE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = 6  # put into the text, fewer where they would fill more than a quarter of it
PLACES = (0.05, 0.85)  # of the first and the last, as shares of what is read


@dataclass(frozen=True)
class RungText:
    """What a rung reads: tokens [0, cut), then those up to `resume`, then the rest.

    cost: tokens that it counts as. skip: positions that are left out before the token at index `cut`. near: how many
    tokens before them those between cut and resume see. tail: tokens at the end whose loss counts. text_T: bool
    [T - 1], targets that are text and no inserted fact. questions: (tokens of it, tokens of its answer).
    """

    ids_T: Tensor
    cost: int
    tail: int
    text_T: Tensor
    questions: tuple[tuple[Tensor, Tensor], ...]
    cut: int = 0
    resume: int = 0
    skip: int = 0
    near: int = 0

    @property
    def tokens_read(self) -> int:
        """Tokens of one pass, and of the questions after it; the last token of an answer is not read."""
        return len(self.ids_T) + sum(len(question) + len(answer) - 1 for question, answer in self.questions)


def rung_text(
    tokenizer: PreTrainedTokenizerBase,
    ids_T: Tensor,
    rung: int,
    plan: Sequence[tuple[int, int]],
    native: int,
    seed: int,
) -> RungText:
    """What a rung reads, with facts in the place of some tokens. The last reads all of the text. The first leaves out
    its middle but not the positions there, the others read the middle with attention to nearby tokens."""
    size, length = plan[rung - 1][0], len(ids_T)
    where: dict[str, int] = {"tail": min(TAIL, max(1, length // 4))}
    if size < length and rung == 1:
        cut = size // 2
        kept_T = torch.cat([ids_T[:cut], ids_T[length - (size - cut) :]])
        where = {"tail": min(TAIL, max(1, (size - cut) // 2)), "cut": cut, "resume": cut, "skip": length - size}
    else:
        kept_T = ids_T.clone()
        if size < length:
            where |= {"cut": min(native, size), "resume": length - where["tail"], "near": max(1, length // NEAR)}
    text_T = torch.ones(len(kept_T), dtype=torch.bool)
    rng = random.Random(f"search {seed}")
    questions = []
    longest = len(encode(tokenizer, NEEDLE.fact.format(key=max(KEYS, key=len), value="9" * DIGITS)))
    count = max(2, min(FACTS, size // (4 * longest)))
    for key, share in zip(rng.sample(KEYS, count), np.linspace(*PLACES, count), strict=True):
        value = str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        fact, question, answer = (
            torch.tensor(encode(tokenizer, part.format(key=key, value=value)))
            for part in (NEEDLE.fact, NEEDLE.question, NEEDLE.answer)
        )
        at = round(float(share) * len(kept_T))
        kept_T[at : at + len(fact)] = fact[: len(kept_T) - at]
        text_T[at : at + len(fact)] = False
        questions.append((question, answer))
    return RungText(kept_T, size, text_T=text_T[1:], questions=tuple(questions), **where)
