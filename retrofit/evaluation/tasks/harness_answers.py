"""What lm-evaluation-harness returned for a task, as scores with the metric of each question where it has one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from retrofit.evaluation.tasks.answers import Score, TaskAnswers


def answers_of(name: str, found: Mapping[str, Any], version: str) -> TaskAnswers:
    """What `simple_evaluate` returned for one task, group or tag. version: of the harness."""
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = found["samples"]
    results, parts = found["results"], list(samples)
    keys = [key for key in results[parts[0]] if "," in key and "_stderr," not in key]
    scores = []
    for key in (key for key in keys if all(key in results[part] for part in parts)):
        metric, _, kept = key.partition(",")
        each = [_of_questions(samples[part], metric, kept, float(results[part][key])) for part in parts]
        questions = None
        if all(one is not None for one in each):
            questions = tuple(value for one in each if one is not None for value in one)
        own = results.get(name, {})
        if key in own:
            value, stderr = float(own[key]), own.get(f"{metric}_stderr,{kept}")
        elif questions:  # a tag has no score of its own: all questions count alike
            value, stderr = sum(questions) / len(questions), _standard_error(questions)
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
        asked=tuple(digest for part in parts for digest in _digests(part, samples[part])),
        scores=tuple(sorted(scores, key=lambda one: one.questions is None)),
    )


def _of_questions(
    samples: Sequence[Mapping[str, Any]], metric: str, kept: str, value: float
) -> tuple[float, ...] | None:
    """The metric of each question, None where it has none or its mean is not the task's value."""
    found = [one[metric] for one in _answered(samples, kept) if metric in one]
    if len(found) != len(_answered(samples, kept)) or not all(isinstance(one, int | float) for one in found):
        return None
    questions = tuple(float(one) for one in found)
    return questions if math.isclose(sum(questions) / len(questions), value, rel_tol=1e-6, abs_tol=1e-9) else None


def _answered(samples: Sequence[Mapping[str, Any]], kept: str) -> list[Mapping[str, Any]]:
    """The samples of one filter, in the order of the questions."""
    return sorted((one for one in samples if one["filter"] == kept), key=lambda one: one["doc_id"])


def _digests(part: str, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        hashlib.sha256(
            json.dumps([part, one["doc_hash"], one["prompt_hash"], one["target_hash"], one["doc_id"]]).encode()
        ).hexdigest()[:16]
        for one in _answered(samples, samples[0]["filter"])
    ]


def _standard_error(values: Sequence[float]) -> float | None:
    mean, n = sum(values) / len(values), len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
