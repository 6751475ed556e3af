"""Answers to the questions of a task, one number a question, and two models paired on the same questions. numpy only.

The difference of two models on the same questions is known far better than either score: most questions both answer
alike, and those say nothing of the difference. Its interval is the paired bootstrap over questions; beside it stand
the questions that only one of the two answers right, and the exact test of McNemar (1947) on their numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrofit.console import jsonable
from retrofit.errors import UserError
from retrofit.evaluation.metrics.bootstrap import mean_interval

FORMAT = 1
FOLDER = "tasks"
BY_CHANCE = 0.05


@dataclass(frozen=True)
class Score:
    """One metric of a task. value and stderr: the harness's own, stderr None where it gives none.

    questions: the metric of each question, in the order of `TaskAnswers.asked`, None of one that does not count to it;
    None as a whole where the value is not their mean (a perplexity, a corpus score), so that nothing can be paired.
    chance: what guesses score on average, where known.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    questions: tuple[float | None, ...] | None = None
    chance: float | None = None


@dataclass(frozen=True)
class TaskAnswers:
    """What one model answered. asked: a digest of each question, its examples and its right answer, and of where its
    prompt was cut.

    not_asked: questions whose prompt the model's window does not hold; they count in no score. scores: the task's own
    metrics, those that can be paired first; the first of all is what a task is known by. harness: version of
    lm-evaluation-harness, empty for a task that is built in. key: digest of everything that the answers depend on;
    equal keys need not be asked again.
    """

    task: str
    version: str
    fewshot: int
    harness: str
    asked: tuple[str, ...]
    scores: tuple[Score, ...]
    key: str = ""
    not_asked: int = 0

    def rows(self) -> tuple[TaskScore, ...]:
        """The scores without the questions."""
        return tuple(
            TaskScore(self.task, one.metric, one.value, one.stderr, self._counting(one), self.fewshot, one.chance)
            for one in self.scores
        )

    def _counting(self, score: Score) -> int:
        """Questions that a score is of."""
        return len(self.asked) if score.questions is None else sum(one is not None for one in score.questions)


@dataclass(frozen=True)
class TaskScore:
    """A score as tables show it. questions: how many were asked, each after `fewshot` examples. chance: as in
    `Score`."""

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int
    fewshot: int
    chance: float | None = None

    @property
    def by_chance(self) -> bool:
        """Whether guessing would score as well once in twenty times or more often: a share of right answers that is
        not shown to be more than chance (one-sided exact binomial test)."""
        if self.chance is None:
            return False
        return at_least(round(self.value * self.questions), self.questions, self.chance) > BY_CHANCE


@dataclass(frozen=True)
class TaskChange:
    """Two models on the same questions. change [low, high]: mean of after - before, with its paired 95% interval.

    drop: how much worse it got, whichever way the metric counts. lost, gained: questions that only the first, or only
    the second, answers right; p: of McNemar's exact test on them. None where a question is not simply right or wrong.
    """

    task: str
    metric: str
    questions: int
    before: float
    after: float
    change: float
    low: float
    high: float
    drop: float
    lost: int | None = None
    gained: int | None = None
    p: float | None = None


def changes(before: TaskAnswers, after: TaskAnswers, *, resamples: int = 2000, seed: int = 0) -> list[TaskChange]:
    """Every metric that both hold, paired on the questions that both were asked; empty where there is none."""
    places = {question: place for place, question in enumerate(before.asked)}
    shared = [(places[question], place) for place, question in enumerate(after.asked) if question in places]
    found = []
    for old in before.scores if shared else ():
        new = next((one for one in after.scores if one.metric == old.metric), None)
        if new is None or old.questions is None or new.questions is None:
            continue
        both = [(old.questions[i], new.questions[j]) for i, j in shared]
        counting = [pair for pair in both if None not in pair]
        if not counting:
            continue
        a, b = np.array(counting, np.float64).T
        interval = mean_interval(b - a, "question", resamples=resamples, seed=seed)
        worse = -1.0 if old.higher_is_better else 1.0
        lost, gained, p = _one_sided(a, b, old.higher_is_better)
        found.append(
            TaskChange(
                task=after.task,
                metric=old.metric,
                questions=len(counting),
                before=float(a.mean()),
                after=float(b.mean()),
                change=interval.value,
                low=interval.low,
                high=interval.high,
                drop=worse * interval.value,
                lost=lost,
                gained=gained,
                p=p,
            )
        )
    return found


def _one_sided(a: np.ndarray, b: np.ndarray, higher: bool) -> tuple[int | None, int | None, float | None]:
    """(right before only, right after only, McNemar's p) where every question is right or wrong."""
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        return None, None, None
    better, worse = int((b > a).sum()), int((b < a).sum())
    lost, gained = (worse, better) if higher else (better, worse)
    return lost, gained, mcnemar(lost, gained)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p: how often a fair coin, thrown for each question that changed, is as one-sided as this."""
    n, few = lost + gained, min(lost, gained)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(few + 1)
    )
    return min(1.0, 2 * tail)


def at_least(right: int, n: int, chance: float) -> float:
    """How often n guesses, each right with probability `chance`, give at least so many right answers."""
    return math.fsum(
        math.exp(
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            + k * math.log(chance) + (n - k) * math.log1p(-chance)
        )
        for k in range(right, n + 1)
    )  # fmt: skip


def metrics_of(answers: Sequence[Mapping[str, TaskAnswers]]) -> dict[str, float]:
    """{"task@NAME": ..., "task_drop@NAME/METRIC": ...} of the last model against the first, as `require` names them.

    answers: of each model by task. Without a metric in its name, a number is of the task's first metric.
    """
    found: dict[str, float] = {}
    for name, last in answers[-1].items():
        for index, one in enumerate(last.scores):
            for suffix in ("", f"/{one.metric}") if index == 0 else (f"/{one.metric}",):
                found[f"task@{name}{suffix}"] = one.value
        for change in changes(answers[0][name], last):
            first = change.metric == last.scores[0].metric
            for suffix in ("", f"/{change.metric}") if first else (f"/{change.metric}",):
                found[f"task_drop@{name}{suffix}"] = change.drop
    return found


def answers_file(run: Path, label: str, task: str) -> Path:
    """Where a run keeps what one of its models answered to one task."""
    name = re.sub(r"[^\w.-]", "_", task)
    return run / FOLDER / label / f"{name}.json"


def samples_file(answers: Path) -> Path:
    """Where the prompts and answers behind a file of scores are kept: `quiz.samples.jsonl` beside `quiz.json`."""
    return answers.with_suffix(".samples.jsonl")


def beside(losses: Path) -> Path:
    """Where `retrofit evaluate` keeps answers: `mqa.tasks.json` beside `mqa.npz`."""
    return losses.with_name(f"{losses.stem}.{FOLDER}.json")


def to_file(answers: Mapping[str, TaskAnswers], path: Path) -> None:
    """Write answers by task; the file is whole or what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    stored = {"format": FORMAT, "tasks": jsonable(answers)}
    partial.write_text(json.dumps(stored, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def from_file(path: Path) -> dict[str, TaskAnswers]:
    """Answers by task. Raises UserError for a file that `to_file` did not write."""
    from pydantic import TypeAdapter, ValidationError

    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']}")
        return TypeAdapter(dict[str, TaskAnswers]).validate_python(stored["tasks"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"these are no answers of this revision of the program: {error}",
            where=str(path),
            fix="evaluate the model again",
        ) from error
