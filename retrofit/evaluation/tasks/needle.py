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

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from retrofit.errors import UserError
from retrofit.evaluation.scoring.reader import Reader, frequencies_of
from retrofit.evaluation.scoring.score import reading
from retrofit.evaluation.tasks.asking import EXTRA_TOKENS, Answer, Question, answered, ask, kept_answers
from retrofit.evaluation.tasks.haystack import Wording, boundaries, encode, filler
from retrofit.kernels.registry import Choice

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
    together: bool
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
    together: bool = False,
    seed: int = 0,
) -> dict[int, list[_Prompt]]:
    """What `needle` asks with these arguments, by length; raises what it raises, and needs no model."""
    if test not in WORDINGS:
        raise UserError(f"`{test}` is not a needle test", where="needle.test", fix=f"use {' or '.join(WORDINGS)}")
    wording = WORDINGS[test]
    hay = filler(tokenizer, prose, max(lengths))
    ends = boundaries(tokenizer, hay)
    if together and ("{key}" not in wording.question or len(depths) > len(KEYS)):
        raise UserError(
            f"`{test}` has {len(KEYS) if '{key}' in wording.question else 'no'} keys to tell needles apart by",
            where="needle.together",
            fix=f"use the test `needle` with up to {len(KEYS)} depths, or leave `together` out",
        )
    hidden = [tuple(depths)] if together else [(depth,) for depth in depths]
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
    together: bool = False,
    seed: int = 0,
    chunk: int = 512,
    kernel: Choice | None = None,
    meta: Mapping[str, object] | None = None,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> NeedleResult:
    """Ask for a needle at every length and depth. prose: what it is hidden in; repeated when it is too short.

    together: the needles of all depths stand in one haystack. partial: a folder where the answers about each haystack
    are kept until all are, for the next call with the same question; meta: digests of model and tokenizer, part of it.

    Raises: UserError for an unknown test, a length in which the question alone has no room, or needles together that
    have no keys, or not enough.
    """
    prompts = haystacks(
        tokenizer, prose, test=test, lengths=lengths, depths=depths, samples=samples, together=together, seed=seed
    )
    cells: list[Cell] = []
    read = 0
    if progress:
        progress.start(test, len(lengths) * len(depths) * samples, "questions")
    with reading(model, kernel, progress) as used:
        asked = ((p.ids, [one.question for one in p.needles]) for some in prompts.values() for p in some)
        kept = kept_answers(partial, model, asked, kernel=used, chunk=chunk, meta=meta, progress=progress)
        for length in lengths:
            asking = _Haystacks(model, tokenizer, length, chunk)
            before: list[int] = []
            for index, prompt in enumerate(prompts[length]):
                read += len(prompt.ids) - asking.read_before(prompt.ids, before)
                before = prompt.ids
                answers = answered(kept, f"{length}-{index}", bound(asking.answers, prompt))
                for one, answer in zip(prompt.needles, answers, strict=True):
                    found = answer.margin > 0 if len(prompt.needles) > 1 else answer.starts
                    cells.append(Cell(length, one.depth, prompt.sample, one.position, answer, found))
                if progress:
                    progress.advance(len(answers), tokens=length)
    if progress:
        progress.finish()
    cells.sort(key=lambda cell: (cell.length, cell.depth, cell.sample))
    scores = {n: float(np.mean([cell.found for cell in cells if cell.length == n])) for n in lengths}
    return NeedleResult(test, tuple(lengths), tuple(depths), samples, together, seed, tuple(cells), scores, read, used)


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


class _Haystacks:
    """Haystacks of one length, read one after another through one cache."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, chunk: int) -> None:
        self._model, self._tokenizer, self._length = model, tokenizer, length
        self._reader = Reader(model, length + EXTRA_TOKENS, chunk=chunk, rewindable=True)
        self._held: list[int] = []

    def read_before(self, ids: Sequence[int], before: Sequence[int]) -> int:
        """How many tokens of `ids` need no reading where `before` was read: whole chunks, and not all of them."""
        shared = min(_shared(ids, before), len(ids) - 1)
        return shared - shared % self._reader.chunk

    def answers(self, prompt: _Prompt) -> list[Answer]:
        """Read a haystack and ask about each of its needles."""
        shared = self.read_before(prompt.ids, self._held)
        with frequencies_of(self._model, self._length):
            self._reader.rewind(shared)
            self._reader.read(torch.tensor(prompt.ids[shared:], device=self._model.device))
            self._held = prompt.ids
            return [ask(self._reader, self._tokenizer, one.question) for one in prompt.needles]


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
    return _Prompt(ids + hay[done:room], tuple(needles), sample)


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


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
