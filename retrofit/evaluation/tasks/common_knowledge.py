"""The built-in task `common_knowledge`: plain general knowledge and common sense, in words that any model has read.

The questions are the project's own (common_knowledge.tsv). Four at a time share the same four options, and each option
is the answer of one of them: whoever prefers options for themselves, for their length or their frequency, answers
exactly a quarter. Some are questions, the others sentences without their ending. They are scored as
lm-evaluation-harness scores its `acc_norm`: right where the answer has the highest log-likelihood a character.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.evaluation.tasks.answers import Score, TaskAnswers, TaskChange, TaskScore
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.evaluation.tasks.multiple_choice import Choice
    from retrofit.kernels.registry import KernelChoice

NAME = "common_knowledge"
METRIC = "acc_norm"
VERSION = "1"
OPTIONS = 4
CHANCE = 1 / OPTIONS
FILE = Path(__file__).with_name("common_knowledge.tsv")


@dataclass(frozen=True)
class Question:
    """A row of the file. text: a question, or a sentence that an option ends. right: index of the answer."""

    topic: str
    text: str
    options: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        """The text as a model reads it, up to the space in front of an option."""
        return f"Question: {self.text}\nAnswer:" if self.text.endswith("?") else self.text

    @property
    def digest(self) -> str:
        """Of the words that are asked."""
        return hashlib.sha256(json.dumps([self.prompt, self.options, self.right]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CommonKnowledge:
    """The task with the questions that are asked."""

    questions: tuple[Question, ...]
    name: str = NAME
    metrics: tuple[str, ...] = (METRIC,)

    @classmethod
    def of(cls, asked: bool | int) -> CommonKnowledge:
        """All questions (True), or so many of them, in whole fours that are spread evenly over the file."""
        everything = questions()
        fours = [everything[start : start + OPTIONS] for start in range(0, len(everything), OPTIONS)]
        count = len(fours) if asked is True else asked // OPTIONS
        chosen = [fours[len(fours) * i // count] for i in range(count)]
        return cls(tuple(question for four in chosen for question in four))

    @property
    def digest(self) -> str:
        """Of all questions."""
        return hashlib.sha256("".join(question.digest for question in self.questions).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """UTF-8 bytes that one model reads: every question once. Of most options it needs to read no token."""
        return sum(len(one.prompt.encode()) for one in self.questions)


@functools.cache
def questions() -> tuple[Question, ...]:
    """All questions, in the order of the file."""
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return tuple(
        Question(topic, text, tuple(options), "ABCD".index(answer)) for topic, text, *options, answer in rows[1:]
    )


def ask(
    task: CommonKnowledge,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = 512,
    kernel: KernelChoice | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> TaskAnswers:
    """Have a model answer the task. tokens, kernel, world, progress: as `log_likelihoods` has them."""
    from retrofit.evaluation.tasks.multiple_choice import log_likelihoods

    choices = choices_of(task)
    found = log_likelihoods(
        model, tokenizer, choices, name=task.name, tokens=tokens, kernel=kernel, world=world, progress=progress
    )
    right = tuple(float(chosen(one.options, row) == one.right) for one, row in zip(choices, found, strict=True))
    share = sum(right) / len(right)
    stderr = math.sqrt(share * (1 - share) / (len(right) - 1))
    return TaskAnswers(
        task=task.name,
        version=VERSION,
        fewshot=0,
        harness="",
        asked=tuple(question.digest for question in task.questions),
        scores=(Score(METRIC, share, stderr, True, right, chance=CHANCE),),
    )


def choices_of(task: CommonKnowledge) -> list[Choice]:
    """The questions as they are scored."""
    from retrofit.evaluation.tasks.multiple_choice import Choice

    return [Choice(one.prompt, one.options, one.right) for one in task.questions]


def chosen(options: Sequence[str], log_likelihoods: Sequence[float]) -> int:
    """Index of the option with the highest log-likelihood a UTF-8 byte; the first of equals."""
    rates = [value / len(option.encode()) for option, value in zip(options, log_likelihoods, strict=True)]
    return rates.index(max(rates))


def score_of(tasks: Sequence[TaskScore]) -> TaskScore | None:
    """The score of this task among those of a model."""
    return next((one for one in tasks if one.task == NAME), None)


def kept(original: TaskScore, model: TaskScore) -> float | None:
    """Share of what the original answers beyond chance that a model still answers, at least 0; None where the original
    is not shown to answer more than chance."""
    return None if original.by_chance else max(0.0, (model.value - CHANCE) / (original.value - CHANCE))


def sentence(original: Sequence[TaskScore], model: Sequence[TaskScore], changes: Sequence[TaskChange]) -> str:
    """What is left of the original's general knowledge, in words: "it answers 41% of 504 common-knowledge questions
    where the original answers 58% (chance 25%)". Empty where it was not asked.

    original, model: the scores of both. changes: of the model against the original.
    """
    before, after = score_of(original), score_of(model)
    if before is None or after is None:
        return ""
    text = f"it answers {after.value:.0%} of {after.questions:,} common-knowledge questions"
    if after.by_chance:
        text += f", which is not distinguishable from chance ({CHANCE:.0%}),"
    text += f" where the original answers {before.value:.0%}"
    if before.by_chance:
        return f"{text}, by chance as well" if after.by_chance else f"{text}, by chance"
    if after.by_chance:
        return text
    change = next((one for one in changes if one.task == NAME), None)
    same = change is not None and change.low <= 0 <= change.high
    return f"{text} (chance {CHANCE:.0%}{'; no difference is shown' if same else ''})"
