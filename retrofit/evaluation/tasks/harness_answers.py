"""What lm-evaluation-harness returned for a task, as scores with the metric of each question where it has one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from retrofit.evaluation.tasks.answers import Score, TaskAnswers

NOT_THIS_ONE = -1.0
"""What the harness's RULER gives for a question of another length than a metric's."""

Sample = Mapping[str, Any]


class Reading(Protocol):
    """How prompts were read: `harness_reader.Prompts` with the model's tokenizer."""

    def skipped(self, sample: Sample) -> bool:
        """Whether the question was not asked, because its prompt is longer than the window."""

    def cut_to(self, sample: Sample) -> int | None:
        """Tokens that the prompt was cut to; None where it was read whole."""


class AsTheyAre:
    """Every prompt was read whole."""

    def skipped(self, sample: Sample) -> bool:
        return False

    def cut_to(self, sample: Sample) -> int | None:
        return None


def answers_of(name: str, found: Mapping[str, Any], version: str, reading: Reading | None = None) -> TaskAnswers:
    """What `simple_evaluate` returned for one task, group or tag. version: of the harness.

    Questions that were not asked have no digest and count in no score: where there are some, a score is the mean of the
    others, and one that is no mean is left out.
    """
    reading = reading or AsTheyAre()
    samples: Mapping[str, Sequence[Sample]] = found["samples"]
    results, parts = found["results"], list(samples)
    first = {part: _answered(samples[part], samples[part][0]["filter"]) for part in parts}
    asked = {part: [not reading.skipped(one) for one in first[part]] for part in parts}
    skipped = sum(not one for each in asked.values() for one in each)
    keys = [key for key in results[parts[0]] if "," in key and "_stderr," not in key]
    scores = []
    for key in (key for key in keys if all(key in results[part] for part in parts)):
        metric, _, kept = key.partition(",")
        each = [_of_questions(samples[part], metric, kept, float(results[part][key])) for part in parts]
        questions: tuple[float | None, ...] | None = None
        if all(one is not None for one in each):
            both = zip(parts, each, strict=True)
            questions = tuple(v for part, one in both for v, a in zip(one or (), asked[part], strict=True) if a)
        counting = [one for one in questions or () if one is not None]
        own = results.get(name, {})
        if questions is not None and not counting:
            continue  # a metric of other questions than these
        if key in own and not skipped:
            value, stderr = float(own[key]), own.get(f"{metric}_stderr,{kept}")
        elif counting:  # a tag has no score of its own: all questions count alike
            value, stderr = sum(counting) / len(counting), _standard_error(counting)
        else:
            continue
        higher = found["higher_is_better"][parts[0]].get(metric)
        scores.append(
            Score(
                metric=metric if kept == "none" else key,
                value=value,
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=higher is not False,
                questions=questions,
            )
        )
    shots = {found["n-shot"][part] for part in parts}
    versions = {str(found["versions"][part]) for part in parts}
    return TaskAnswers(
        task=name,
        version=", ".join(sorted(versions)),
        fewshot=max(shots),
        harness=version,
        asked=tuple(
            _digest(part, one, reading) for part in parts for one, a in zip(first[part], asked[part], strict=True) if a
        ),
        scores=tuple(sorted(scores, key=lambda one: one.questions is None)),
        not_asked=skipped,
    )


def logged(name: str, found: Mapping[str, Any], reading: Reading | None = None) -> Iterator[str]:
    """Every question with its prompts, the right answer, the model's and its metrics, as lines of JSON in ASCII."""
    reading = reading or AsTheyAre()
    samples: Mapping[str, Sequence[Sample]] = found["samples"]
    for part, every in samples.items():
        for one in every:
            if reading.skipped(one):
                continue
            line = {
                "task": name,
                "part": part,
                "question": one["doc_id"],
                "asked": _digest(part, one, reading),
                "cut_to": reading.cut_to(one),
                "prompts": one["arguments"],
                "target": one["target"],
                "answers": one["filtered_resps"],
                "filter": one["filter"],
                "metrics": {metric: one[metric] for metric in one["metrics"] if metric in one},
            }
            yield json.dumps(line, default=str)


def _of_questions(samples: Sequence[Sample], metric: str, kept: str, value: float) -> tuple[float | None, ...] | None:
    """The metric of each question, None of one that does not count to it; None where a question has none, or their mean
    is not the task's value."""
    answered = _answered(samples, kept)
    found = [one[metric] for one in answered if metric in one]
    if not all(isinstance(one, int | float) for one in found):
        return None
    if len(found) == len(answered) and set(found) != {NOT_THIS_ONE} and _is_mean(found, value):
        return tuple(float(one) for one in found)
    counting = [float(one) for one in found if one != NOT_THIS_ONE]
    if len(counting) < len(answered) and (_is_mean(counting, value) if counting else value == NOT_THIS_ONE):
        of_each = (one.get(metric, NOT_THIS_ONE) for one in answered)
        return tuple(None if one == NOT_THIS_ONE else float(one) for one in of_each)
    return None


def _is_mean(values: Sequence[float], value: float) -> bool:
    return math.isclose(sum(values) / len(values), value, rel_tol=1e-6, abs_tol=1e-9)


def _answered(samples: Sequence[Sample], kept: str) -> list[Sample]:
    """The samples of one filter, in the order of the questions."""
    return sorted((one for one in samples if one["filter"] == kept), key=lambda one: one["doc_id"])


def _digest(part: str, one: Sample, reading: Reading) -> str:
    """What a question is known by: two models that have it alike were shown the same prompt."""
    known: list[object] = [part, one["doc_hash"], one["prompt_hash"], one["target_hash"], one["doc_id"]]
    cut = reading.cut_to(one)
    return hashlib.sha256(json.dumps(known if cut is None else [*known, cut]).encode()).hexdigest()[:16]


def _standard_error(values: Sequence[float]) -> float | None:
    mean, n = sum(values) / len(values), len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
