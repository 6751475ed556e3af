"""Needle in a haystack (Kamradt 2023) and passkey (Mohtashami & Jaggi 2023): is a fact found wherever it stands?

A grid of lengths x depths. Each prompt has exactly the length asked for, answer included, in the model's own tokens:
opening, prose up to the depth, the needle, the rest of the prose, the question. The question repeats the needle's
words, so that a small base model can answer by continuing, without examples. Beside the greedy answer each cell has the
loss of the right answer and its margin over a wrong one of the same form, the other needles' where there are any: a
signal where exact match gives none.

The prose before a needle is the same for every depth: it is read once, and the cache goes back to it, to the end of a
chunk, so that a haystack is read in the same chunks, and answered with the same bits, whatever was read before. Or all
depths' needles stand together in one haystack, each with a key of its own (RULER's multi-key retrieval, arXiv
2404.06654): one pass a length, and a harder test, because the other needles look like the one asked for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrofit.errors import UserError
from retrofit.evaluation.tasks.asking import EXTRA_TOKENS, Answer, Question, TextReader, answers_about, tokens_read
from retrofit.evaluation.tasks.haystack import Wording, boundaries, encode, filler
from retrofit.kernels.registry import KernelChoice
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress

NEEDLE = Wording(
    opening="",
    fact=" The special magic number for {key} is {value}.",
    question="\n\nThe special magic number for {key} is",
    answer=" {value}",
)
PASSKEY = Wording(
    opening="There is an important piece of information hidden in the following text. Find it and memorize it.\n\n",
    fact=" The pass key is {value}. Remember it. {value} is the pass key.",
    question="\n\nWhat is the pass key? The pass key is",
    answer=" {value}",
)
WORDINGS = {"needle": NEEDLE, "passkey": PASSKEY}
KEYS = ("Paris", "Oslo", "Lima", "Cairo", "Quito", "Tokyo", "Rome", "Delhi", "Dublin", "Havana", "Madrid", "Seoul")
DIGITS = 5


@dataclass(frozen=True)
class Cell:
    """One needle. depth: share of the prose that stands before it; position: its first token. answer: what came.

    found: the generated answer is the right one, or with needles together, the right one is preferred to that of every
    other needle, as chance does for one of them.
    """

    length: int
    depth: float
    sample: int
    position: int
    answer: Answer
    found: bool


@dataclass(frozen=True)
class NeedleResult:
    """Every cell of one test. scores: share of needles found by length, what effective length looks at. read: tokens
    that passes read, also those before an interruption.
    """

    test: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    multi_key: bool
    seed: int
    cells: tuple[Cell, ...]
    scores: Mapping[int, float]
    read: int
    kernel: str


def depths(count: int) -> tuple[float, ...]:
    """`count` depths from 0 to 1."""
    return tuple(float(depth) for depth in np.linspace(0, 1, count)) if count > 1 else (0.5,)


def haystacks(
    tokenizer: PreTrainedTokenizerBase,
    prose: str,
    *,
    test: str = "needle",
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int = 1,
    multi_key: bool = False,
    seed: int = 0,
) -> dict[int, list[_Prompt]]:
    """What `needle` asks with these arguments, by length; raises what it raises, and needs no model."""
    if test not in WORDINGS:
        raise UserError(f"`{test}` is not a needle test", where="needle.test", fix=f"use {' or '.join(WORDINGS)}")
    wording = WORDINGS[test]
    hay = filler(tokenizer, prose, max(lengths))
    ends = boundaries(tokenizer, hay)
    if multi_key and ("{key}" not in wording.question or len(depths) > len(KEYS)):
        raise UserError(
            f"`{test}` has {len(KEYS) if '{key}' in wording.question else 'no'} keys to tell needles apart by",
            where="needle.multi_key",
            fix=f"use the test `needle` with up to {len(KEYS)} depths, or leave `multi_key` out",
        )
    hidden = [tuple(depths)] if multi_key else [(depth,) for depth in depths]
    return {  # of a sample from the deepest needle up: what stands before the next one is still in the cache
        n: [
            prompt
            for s in range(samples)
            for prompt in sorted(
                (_prompt(tokenizer, wording, hay, ends, n, some, s, seed) for some in hidden),
                key=lambda prompt: -prompt.needles[0].position,
            )
        ]
        for n in lengths
    }


def needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prose: str,
    *,
    test: str = "needle",
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int = 1,
    multi_key: bool = False,
    seed: int = 0,
    chunk: int = 512,
    kernel: KernelChoice | None = None,
    meta: Mapping[str, object] | None = None,
    partial: Path | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> NeedleResult:
    """Ask for a needle at every length and depth. prose: what it is hidden in; repeated when it is too short.

    multi_key: the needles of all depths stand in one haystack. partial: a folder where the answers about each haystack
    are kept until all are, for the next call with the same question; meta: digests of model and tokenizer, part of it.
    world: the processes that make this call and share the haystacks.

    Raises: UserError for an unknown test, a length in which the question alone has no room, or needles together that
    have no keys, or not enough.
    """
    prompts = haystacks(
        tokenizer, prose, test=test, lengths=lengths, depths=depths, samples=samples, multi_key=multi_key, seed=seed
    )
    texts = {f"{length}-{index}": p for length, some in prompts.items() for index, p in enumerate(some)}
    readers: dict[int, TextReader] = {}

    def read(prompt: _Prompt, following: Sequence[_Prompt]) -> list[Answer]:
        if prompt.length not in readers:
            readers.clear()  # one cache at a time
            readers[prompt.length] = TextReader(model, tokenizer, prompt.length, chunk)
        alike = itertools.takewhile(lambda later: later.length == prompt.length, following)
        return readers[prompt.length].answers(prompt, list(alike))

    answers, used = answers_about(
        texts,
        read,
        model,
        test=test,
        chunk=chunk,
        kernel=kernel,
        meta=meta,
        partial=partial,
        # The prose before a needle stands in the cache for the other needles of a sample.
        together=lambda prompt: (prompt.length, prompt.sample),
        world=world,
        progress=progress,
    )
    cells = []
    for name, prompt in texts.items():
        for one, answer in zip(prompt.needles, answers[name], strict=True):
            found = answer.margin > 0 if len(prompt.needles) > 1 else answer.starts
            cells.append(Cell(prompt.length, one.depth, prompt.sample, one.position, answer, found))
    cells.sort(key=lambda cell: (cell.length, cell.depth, cell.sample))
    scores = {n: float(np.mean([cell.found for cell in cells if cell.length == n])) for n in lengths}
    count = sum(tokens_read(some, chunk) for some in prompts.values())
    return NeedleResult(
        test, tuple(lengths), tuple(depths), samples, multi_key, seed, tuple(cells), scores, count, used
    )


@dataclass(frozen=True)
class _Hidden:
    """One fact of a prompt. position: its first token."""

    depth: float
    position: int
    question: Question


@dataclass(frozen=True)
class _Prompt:
    """ids: all that is read before a question, the longest of which ends, answered, at the length asked for."""

    ids: list[int]
    needles: tuple[_Hidden, ...]
    sample: int
    length: int

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(one.question for one in self.needles)


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    hay: list[int],
    ends: np.ndarray,
    length: int,
    depths: Sequence[float],
    sample: int,
    seed: int,
) -> _Prompt:
    """A haystack with a needle at each of these depths, which ascend."""
    rng = random.Random(f"{seed}/{sample}/{length}/{'/'.join(map(str, depths))}")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    start = bos + encode(tokenizer, wording.opening)
    keys = rng.sample(KEYS, len(depths))
    values = [_number(rng) for _ in keys]
    facts, questions, asked = [], [], []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        facts.append(encode(tokenizer, wording.fact.format(key=key, value=value)))
        text, right = (part.format(key=key, value=value) for part in (wording.question, wording.answer))
        answer = encode(tokenizer, right)
        others = tuple(wording.answer.format(key=key, value=other) for other in values[:i] + values[i + 1 :])
        wrong = others or (_like(tokenizer, wording, rng, key, value, len(answer)),)
        questions.append(Question(text, (value,), (right,), wrong, len(answer) + EXTRA_TOKENS))
        asked.append(max(len(encode(tokenizer, text)) + len(encode(tokenizer, one)) for one in (right, *wrong)))
    room = length - len(start) - sum(map(len, facts)) - max(asked)
    if room < 1:
        raise UserError(
            f"{length} tokens have no room for the needle and its question, which need {length - room}",
            where="needle.lengths",
            fix=f"use at least {2 * (length - room)}",
        )
    ids, needles, done = list(start), [], 0
    for depth, fact, question in zip(depths, facts, questions, strict=True):
        at = int(ends[np.abs(ends - depth * room).argmin()]) if 0 < depth < 1 else round(depth * room)
        at = max(done, min(at, room))
        ids += hay[done:at]
        needles.append(_Hidden(depth, len(ids), question))
        ids += fact
        done = at
    return _Prompt(ids + hay[done:room], tuple(needles), sample, length)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _like(
    tokenizer: PreTrainedTokenizerBase, wording: Wording, rng: random.Random, key: str, value: str, tokens: int
) -> str:
    """A wrong answer of as many tokens, where a few tries find one."""
    for _ in range(50):
        other = _number(rng)
        text = wording.answer.format(key=key, value=other)
        if other != value and len(encode(tokenizer, text)) == tokens:
            break
    return text
