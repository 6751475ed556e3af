"""What models answer to the tasks of lm-evaluation-harness, and what that is against the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrofit import format as fmt
from retrofit.report.parts import Figure, Table

if TYPE_CHECKING:
    from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
    from retrofit.report.data import RunData

HEADERS = (
    "task", "metric", "model", "score ± standard error", "against the original", "only original right", "only it right",
    "p (McNemar)", "questions",
)  # fmt: skip


def figures(run: RunData) -> Iterator[Figure]:
    """The section `tasks`: a row for each metric and model."""
    asked = [(score.task, score.metric) for model in run.models for score in model.tasks]
    if not asked:
        return
    rows = []
    for task, metric in dict.fromkeys(asked):
        for model in run.models:
            score = next((one for one in model.tasks if (one.task, one.metric) == (task, metric)), None)
            change = next((one for one in model.task_changes if (one.task, one.metric) == (task, metric)), None)
            if score is not None:
                rows.append((task, metric, model.label, scored(score), *_paired(change), fmt.count(score.questions)))
    shots = sorted({score.fewshot for model in run.models for score in model.tasks})
    yield Figure(
        "tasks",
        "Tasks",
        "Tasks of lm-evaluation-harness, the same questions for every model, after "
        f"{' or '.join(map(str, shots))} examples. Against the original: the mean difference on the same questions "
        "with its 95% interval (paired bootstrap over questions). An interval that holds 0 does not show that nothing "
        "changed: a change of up to either end is compatible with the data. Beside it the questions that only one of "
        "the two answers right.",
        Table(HEADERS, tuple(rows)),
    )


def cautions(run: RunData) -> list[str]:
    """Tasks that the final model is shown to do worse than the original: the whole interval lies on that side."""
    worse = [
        change
        for change in (run.final.task_changes if run.final else ())
        if change.low * change.high > 0 and change.drop > 0
    ]
    return [f"It does worse than the original on {one.task}, {one.metric}: {changed(one)}." for one in worse]


def scored(score: TaskScore) -> str:
    """0.412 ± 0.013."""
    return f"{score.value:.4g}" if score.stderr is None else f"{score.value:.4g} ± {score.stderr:.2g}"


def changed(change: TaskChange) -> str:
    """-0.012 [-0.021, -0.003]."""
    return f"{change.change:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def _paired(change: TaskChange | None) -> tuple[str, str, str, str]:
    if change is None:
        return (fmt.NONE, fmt.NONE, fmt.NONE, fmt.NONE)
    p = fmt.NONE if change.p is None else fmt.number(change.p, 2)
    return (changed(change), fmt.count(change.lost), fmt.count(change.gained), p)
