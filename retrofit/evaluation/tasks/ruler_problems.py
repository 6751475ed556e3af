"""The texts and questions of the RULER tasks, each of exactly the length asked for."""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial as bound
from typing import TYPE_CHECKING

import numpy as np

from retrofit.errors import UserError
from retrofit.evaluation.tasks.asking import Question
from retrofit.evaluation.tasks.haystack import boundaries, encode, filler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = 4  # of niah_multikey
HOPS, CHAINS = 2, 2
COMMON_WORDS = 10
FREQUENT_WORDS = 3
ZETA_2 = np.pi**2 / 6


@dataclass(frozen=True)
class Problem:
    """A text and questions about it. ids with a question and room for its answer are exactly `length` tokens."""

    ids: list[int]
    questions: tuple[Question, ...]
    length: int


def problems_of(
    tokenizer: PreTrainedTokenizerBase,
    prose: str,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int = 1,
    seed: int = 0,
) -> dict[tuple[str, int, int], Problem]:
    """What `ruler` asks with these arguments, by (task, length, sample); raises what it raises, and needs no model."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"`{unknown[0]}` is not a task", where="ruler.tasks", fix=f"use {', '.join(TASKS)}")
    return {
        (task, length, sample): problem(task, tokenizer, prose, length, seed=seed, sample=sample)
        for task in tasks
        for length in lengths
        for sample in range(samples)
    }


def problem(
    task: str, tokenizer: PreTrainedTokenizerBase, prose: str, length: int, *, seed: int = 0, sample: int = 0
) -> Problem:
    """One text of a task with its questions; the same arguments give the same text."""
    rng = random.Random(f"{seed}/{task}/{length}/{sample}")
    return TASKS[task](tokenizer, prose, length, rng)


# ------------------------------------------------------------------------------------------------------ the tasks


def _niah(keys: int) -> Callable[..., Problem]:
    def make(tokenizer: PreTrainedTokenizerBase, prose: str, length: int, rng: random.Random) -> Problem:
        names = rng.sample(_words(prose), keys)
        values = [str(rng.randrange(10**6, 10**7)) for _ in range(keys + 1)]
        facts = [f" One of the special magic numbers for {k} is: {v}." for k, v in zip(names, values, strict=False)]
        questions = [
            Question(
                text=f"\n\nWhat is the special magic number for {name} mentioned in the provided text? One of the "
                f"special magic numbers for {name} is:",
                expected=(values[i],),
                right=(f" {values[i]}",),
                # Another key's number, which stands in the text; with one key a number that does not.
                wrong=(f" {values[(i + 1) % keys] if keys > 1 else values[-1]}",),
                tokens=12,
            )
            for i, name in enumerate(names)
        ]
        opening = "Some special magic numbers are hidden within the following text. Make sure to memorize them.\n"
        return _in_prose(tokenizer, prose, length, rng, opening, facts, questions)

    return make


def _variable_tracking(tokenizer: PreTrainedTokenizerBase, prose: str, length: int, rng: random.Random) -> Problem:
    names: list[str] = []
    while len(names) < CHAINS * (HOPS + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [] if name in names else [name]
    chains = [names[i * (HOPS + 1) : (i + 1) * (HOPS + 1)] for i in range(CHAINS)]
    values = rng.sample(range(10_000, 100_000), CHAINS)
    lines = []
    for chain, value in zip(chains, values, strict=True):
        lines.append([f" VAR {chain[0]} = {value}.", *(f" VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain))])
    facts = []  # the chains mixed, each in its own order
    while any(lines):
        facts.append(rng.choice([line for line in lines if line]).pop(0))
    questions = [
        Question(
            text=f"\n\nQuestion: Find all variables that are assigned the value {value} in the text above.\nAnswer: "
            f"{len(chain)} variables are assigned the value {value}, they are:",
            expected=tuple(chain),
            right=(" " + ", ".join(chain),),
            wrong=(" " + ", ".join(chains[1 - i]),),
            tokens=30,
        )
        for i, (chain, value) in enumerate(zip(chains, values, strict=True))
    ]
    opening = "Memorize and track the chains of variable assignment hidden in the following text.\n\n"
    return _in_prose(tokenizer, prose, length, rng, opening, facts, questions)


def _common_words(tokenizer: PreTrainedTokenizerBase, prose: str, length: int, rng: random.Random) -> Problem:
    words = _words(prose)
    rng.shuffle(words)
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    order = random.Random(rng.random())
    state = order.getstate()

    def text(often: int, rarely: int, count: int) -> str:
        order.setstate(state)
        listed = common * often + others[:count] * rarely
        order.shuffle(listed)
        return " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))

    question = Question(
        text=f"\nQuestion: What are the {COMMON_WORDS} most common words in the above list?\nAnswer: The top "
        f"{COMMON_WORDS} words that appear most often in the list are: 1.",
        expected=tuple(common),
        right=tuple(f" {word}" for word in common),
        wrong=tuple(f" {word}" for word in others[:COMMON_WORDS]),
        tokens=60,
    )
    opening = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    few = bound(text, 6, 1)
    room = _room(tokenizer, length, _start(tokenizer, opening), [question])
    many = bound(text, 30, 3)  # in long texts
    listing = many if length >= 4096 and len(encode(tokenizer, many(COMMON_WORDS))) <= room else few
    return _filled(tokenizer, prose, length, opening, listing, (COMMON_WORDS, len(others)), question)


def _frequent_words(tokenizer: PreTrainedTokenizerBase, prose: str, length: int, rng: random.Random) -> Problem:
    words: list[str] = []
    while len(words) < max(length // 50, 2 * FREQUENT_WORDS + 1):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        words += [] if word in words else [word]
    ranked = ["...", *words]  # the first of the distribution is noise
    order = random.Random(rng.random())
    state = order.getstate()

    def text(count: int) -> str:
        order.setstate(state)
        times = [max(1, int(count * rank**-2.0 / ZETA_2)) for rank in range(1, len(ranked) + 1)]
        listed = [word for word, n in zip(ranked, times, strict=True) for _ in range(n)]
        order.shuffle(listed)
        return " ".join(listed)

    top, rest = words[:FREQUENT_WORDS], words[FREQUENT_WORDS : 2 * FREQUENT_WORDS]
    question = Question(
        text="\nQuestion: Please ignore the dots. What are the three most frequently appeared words in the above coded "
        "text?\nAnswer: According to the coded text above, the three most frequently appeared words are:",
        expected=tuple(top),
        right=tuple(f" {word}" for word in top),
        wrong=tuple(f" {word}" for word in rest),
        tokens=30,
    )
    opening = "Read the following coded text and track the frequency of each coded word.\n"
    return _filled(tokenizer, prose, length, opening, text, (60, length), question)


TASKS: dict[str, Callable[..., Problem]] = {
    "niah_single": _niah(1),
    "niah_multikey": _niah(KEYS),
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}


# ------------------------------------------------------------------------------------------- texts of exact length


def _in_prose(
    tokenizer: PreTrainedTokenizerBase,
    prose: str,
    length: int,
    rng: random.Random,
    opening: str,
    facts: Sequence[str],
    questions: Sequence[Question],
) -> Problem:
    """Facts in their order at random sentence ends of prose, filled up to the length with the longest question."""
    start = _start(tokenizer, opening)
    parts = [encode(tokenizer, fact) for fact in facts]
    room = _room(tokenizer, length, start, questions) - sum(map(len, parts))
    _require_room(room, length)
    hay = filler(tokenizer, prose, room)
    ends = [0, *boundaries(tokenizer, hay).tolist()]
    places = sorted(rng.choices(ends, k=len(parts)))
    ids, done = list(start), 0
    for place, part in zip(places, parts, strict=True):
        ids += hay[done:place] + part
        done = place
    return Problem(ids + hay[done:], tuple(questions), length)


def _filled(
    tokenizer: PreTrainedTokenizerBase,
    prose: str,
    length: int,
    opening: str,
    text: Callable[[int], str],
    counts: tuple[int, int],
    question: Question,
) -> Problem:
    """The longest `text(count)` that fits, counts[0] <= count <= counts[1], with prose in front for what is left."""
    start = _start(tokenizer, opening)
    room = _room(tokenizer, length, start, [question])
    low, high = counts
    _require_room(room - len(encode(tokenizer, text(low))), length)
    while low < high:  # the tokens grow with the count
        middle = (low + high + 1) // 2
        fits = len(encode(tokenizer, text(middle))) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    body = encode(tokenizer, text(low))
    left = room - len(body)
    bos = start[: len(start) - len(encode(tokenizer, opening))]
    return Problem(
        bos + (filler(tokenizer, prose, left) if left else []) + start[len(bos) :] + body, (question,), length
    )


def _start(tokenizer: PreTrainedTokenizerBase, opening: str) -> list[int]:
    return ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + encode(tokenizer, opening)


def _room(tokenizer: PreTrainedTokenizerBase, length: int, start: Sequence[int], questions: Sequence[Question]) -> int:
    return length - len(start) - max(question.room(tokenizer) for question in questions)


def _require_room(room: int, length: int) -> None:
    if room < 1:
        raise UserError(
            f"{length} tokens have no room for the task, which needs {length - room + 1} before any filling",
            where="ruler.lengths",
            fix=f"use at least {2 * (length - room)}",
        )


def _words(prose: str) -> list[str]:
    """Distinct plain words of the prose in the order of the alphabet."""
    words = sorted(set(re.findall(r"(?<![\w.])[a-z]{4,9}(?![\w.])", prose)))
    if len(words) < 2 * COMMON_WORDS:
        raise UserError("the haystack has too few different words", where="ruler", fix="name a longer text")
    return words
