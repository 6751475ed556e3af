"""What models answer to tasks, and what that is against the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrofit import format as fmt
from retrofit.evaluation.tasks import common_knowledge
from retrofit.report.parts import Figure, Number, Table

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
            missing = model.not_asked.get(task, 0)
            if score is not None:
                asked_of = fmt.count(score.questions) + (f" ({fmt.count(missing)} not asked)" if missing else "")
                rows.append((task, metric, model.label, scored(score), *_paired(change), asked_of))
            elif missing:
                rows.append(
                    (task, metric, model.label, "not asked", *_paired(None), f"0 ({fmt.count(missing)} not asked)")
                )
    yield Figure(
        "tasks",
        "Tasks",
        f"The same questions for every model: {_whose(run)}. Against the original: the mean difference on the same "
        "questions with its 95% interval (paired bootstrap over questions). An interval that holds 0 does not show "
        "that nothing changed: a change of up to either end is compatible with the data. Beside it the questions that "
        f"only one of the two answers right.{_unasked(run)}",
        Table(HEADERS, tuple(rows)),
    )


def cautions(run: RunData) -> list[str]:
    """Tasks that the final model is shown to do worse than the original: the whole interval lies on that side."""
    worse = [
        change
        for change in (run.final.task_changes if run.final else ())
        if change.low * change.high > 0 and change.drop > 0
    ]
    found = [f"It does worse than the original on {one.task}, {one.metric}: {changed(one)}." for one in worse]
    asked = _both(run)
    if asked and asked[1].by_chance and not asked[0].by_chance:
        found.append(
            "Its general knowledge is gone, as far as these questions show: its share of right answers to "
            f"`{common_knowledge.NAME}` is not distinguishable from chance."
        )
    return found


def knowledge(run: RunData) -> str:
    """What is left of the original's general knowledge, as a clause; empty where it was not asked."""
    if run.original is None or run.final is None:
        return ""
    return common_knowledge.sentence(run.original.tasks, run.final.tasks, run.final.task_changes)


def number(run: RunData) -> list[Number]:
    """Common knowledge, for the top of the page."""
    asked = _both(run)
    if asked is None:
        return []
    before, after = asked
    detail = f"the original {before.value:.0%}, chance {common_knowledge.CHANCE:.0%}"
    share = common_knowledge.kept(before, after)
    if after.by_chance:
        detail += "; not distinguishable from chance"
    elif share is not None:
        detail += f": {share:.0%} of what it answers beyond chance"
    return [Number("Common knowledge, right answers", f"{after.value:.0%}", detail)]


def _both(run: RunData) -> tuple[TaskScore, TaskScore] | None:
    """The original's and the final model's score in common knowledge, where both have one."""
    if run.original is None or run.final is None:
        return None
    before, after = (common_knowledge.score_of(model.tasks) for model in (run.original, run.final))
    return (before, after) if before and after else None


def _whose(run: RunData) -> str:
    """Whose tasks were asked, and how."""
    scores = [score for model in run.models for score in model.tasks]
    shots = sorted({score.fewshot for score in scores if score.task != common_knowledge.NAME})
    own = [f"`{common_knowledge.NAME}`, plain questions of this program with four answers to choose from"]
    own = own if any(score.task == common_knowledge.NAME for score in scores) else []
    theirs = [f"tasks of lm-evaluation-harness, after {' or '.join(map(str, shots))} examples"] if shots else []
    return "; ".join([*own, *theirs])


def _unasked(run: RunData) -> str:
    """Why some models were not asked all questions, as a sentence after others."""
    labels = [f"`{model.label}`" for model in run.models if model.not_asked]
    if not labels:
        return ""
    whose = f"{' and '.join(labels)}, whose context is shorter"
    return f" What a window does not hold was not asked of {whose}; pairs are of the questions that both answered."


def scored(score: TaskScore) -> str:
    """0.412 ± 0.013 (chance 0.25)."""
    text = f"{score.value:.4g}" if score.stderr is None else f"{score.value:.4g} ± {score.stderr:.2g}"
    return text if score.chance is None else f"{text} (chance {score.chance:.4g})"


def changed(change: TaskChange) -> str:
    """-0.012 [-0.021, -0.003]."""
    return f"{change.change:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def _paired(change: TaskChange | None) -> tuple[str, str, str, str]:
    if change is None:
        return (fmt.NONE, fmt.NONE, fmt.NONE, fmt.NONE)
    p = fmt.NONE if change.p is None else fmt.number(change.p, 2)
    return (changed(change), fmt.count(change.lost), fmt.count(change.gained), p)
