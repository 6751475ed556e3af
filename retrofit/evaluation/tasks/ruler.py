"""RULER's offline tasks (Hsieh et al. 2024, arXiv 2404.06654), in the model's own tokens, sized for small models.

Retrieval of one and of several keys, variable tracking, common words, frequent words. As there, a text is filled to its
length and the answer is searched in what the model generates. Different from there, so that a small base model gives a
signal: no examples in the prompt, a second chain of variables, fewer hops, and right answers scored by loss against
wrong ones of the same form that stand in the same text. Numbers are therefore not those of the paper's leaderboard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrofit.evaluation.tasks.asking import Answer, TextReader, answers_about
from retrofit.evaluation.tasks.ruler_problems import problems_of
from retrofit.kernels.registry import KernelChoice
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress


@dataclass(frozen=True)
class Row:
    """One task at one length. recall: mean share of the expected strings in the greedy answers (RULER's score).

    loss, margin, token_match: means of `Answer`'s. preferred: share of questions whose right answers lose less than the
    wrong ones. questions: how many.
    """

    task: str
    length: int
    questions: int
    recall: float
    loss: float
    margin: float
    preferred: float
    token_match: float


@dataclass(frozen=True)
class RulerResult:
    """rows: by task and length. answers: every answer as (task, length, sample, answer)."""

    rows: tuple[Row, ...]
    answers: tuple[tuple[str, int, int, Answer], ...]
    samples: int
    seed: int
    kernel: str


def ruler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prose: str,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int = 1,
    seed: int = 0,
    chunk: int = 512,
    kernel: KernelChoice | None = None,
    meta: Mapping[str, object] | None = None,
    partial: Path | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> RulerResult:
    """Every task at every length. prose: haystack and source of words.

    partial: a folder where the answers about each text are kept until all are, for the next call with the same
    question; meta: digests of model and tokenizer, part of that question. world: the processes that make this call and
    share the texts.

    Raises: UserError for an unknown task, or a length too short for one.
    """
    problems = problems_of(tokenizer, prose, tasks=tasks, lengths=lengths, samples=samples, seed=seed)
    texts = {f"{task}@{length}-{sample}": found for (task, length, sample), found in problems.items()}
    found, used = answers_about(
        texts,
        lambda text, _: TextReader(model, tokenizer, text.length, chunk).answers(text),
        model,
        test="ruler",
        chunk=chunk,
        kernel=kernel,
        meta=meta,
        partial=partial,
        world=world,
        progress=progress,
    )
    answers = [(*key, one) for key, some in zip(problems, found.values(), strict=True) for one in some]
    rows = [
        _row(task, length, [answer for t, n, _, answer in answers if (t, n) == (task, length)])
        for task in tasks
        for length in lengths
    ]
    return RulerResult(tuple(rows), tuple(answers), samples, seed, used)


def _row(task: str, length: int, answers: Sequence[Answer]) -> Row:
    mean = {
        name: float(np.mean([getattr(answer, name) for answer in answers]))
        for name in ("recall", "loss", "margin", "token_match")
    }
    return Row(task, length, len(answers), preferred=float(np.mean([a.margin > 0 for a in answers])), **mean)
