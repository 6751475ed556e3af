"""What page and title say of tasks, and of how much general knowledge is left."""

from __future__ import annotations

from dataclasses import replace

from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
from retrofit.report.charts.figures import figures
from retrofit.report.data import RunData
from retrofit.report.render import html, markdown
from retrofit.report.sections import summary
from tests.report.made_up import run
from tests.report.reading import visible


def test_tasks_are_shown_with_what_they_are_against_the_original() -> None:
    (shown,) = (one for one in figures(run()) if one.section == "tasks")
    rows = {row[:3]: row[3:] for row in shown.table.rows}
    assert rows["arc_easy", "acc", "original"] == ("0.612 ± 0.01", "–", "–", "–", "–", "2,376")
    paired = ("0.574 ± 0.01", "-0.038 [-0.049, -0.026]", "210", "120", "7.4e-07", "2,376")
    assert rows["arc_easy", "acc", "recovered"] == paired
    assert rows["lambada", "perplexity", "recovered"] == ("12.5", "–", "–", "–", "–", "5,153")
    assert "How it answers questions" in visible(html(run()))
    assert "| arc_easy | acc_norm |" in markdown(run())
    worse = [one for one in summary.cautions(run()) if "does worse" in one]
    assert worse[0] == "It does worse than the original on arc_easy, acc: -0.038 [-0.049, -0.026]."
    last = run().models[2]
    unsure = tuple(replace(one, high=0.001) for one in last.task_changes)
    maybe = run(models=(*run().models[:2], replace(last, task_changes=unsure)))
    assert not [one for one in summary.cautions(maybe) if "does worse" in one]
    without = tuple(replace(one, tasks=(), task_changes=()) for one in run().models)
    assert "How it answers questions" not in html(run(models=without))


def knowing(original: float, final: float, *, low: float = -0.3, high: float = -0.1) -> RunData:
    """A run whose models were asked common knowledge; low, high: of the difference."""
    first, _, last = run().models

    def score(value: float) -> tuple[TaskScore, ...]:
        return (TaskScore("common_knowledge", "acc_norm", value, 0.02, 504, 0, 0.25),)

    drop = original - final
    change = TaskChange("common_knowledge", "acc_norm", 504, original, final, -drop, low, high, drop, 1, 1, 0.1)
    return run(
        models=(
            replace(first, tasks=score(original), task_changes=()),
            replace(last, tasks=score(final), task_changes=(change,)),
        )
    )


def test_the_title_says_what_is_left_of_general_knowledge() -> None:
    found = knowing(0.58, 0.41)
    clause = "it answers 41% of 504 common-knowledge questions where the original answers 58% (chance 25%)"
    assert summary.verdict(found).endswith(f"; {clause}.")
    assert clause in markdown(found)
    assert clause in visible(html(found))
    (number,) = (one for one in summary.key_numbers(found) if one.label.startswith("Common knowledge"))
    assert number.value == "41%"
    assert number.detail == "the original 58%, chance 25%: 48% of what it answers beyond chance"
    assert "0.41 ± 0.02 (chance 0.25)" in markdown(found)
    assert "common-knowledge" not in summary.verdict(run())


def test_the_title_says_that_general_knowledge_is_gone() -> None:
    found = knowing(0.58, 0.27)
    clause = (
        "it answers 27% of 504 common-knowledge questions, which is not distinguishable from chance (25%), where the "
        "original answers 58%"
    )
    assert clause in summary.verdict(found)
    assert any("general knowledge is gone" in one for one in summary.cautions(found))
    assert not any("general knowledge is gone" in one for one in summary.cautions(knowing(0.58, 0.41)))
    (number,) = (one for one in summary.key_numbers(found) if one.label.startswith("Common knowledge"))
    assert number.detail == "the original 58%, chance 25%; not distinguishable from chance"


def test_the_title_says_where_no_general_knowledge_is_shown_to_be_lost() -> None:
    assert "(chance 25%; no difference is shown)" in summary.verdict(knowing(0.58, 0.57, low=-0.03, high=0.01))


def test_the_title_says_where_the_original_guesses_too() -> None:
    verdict = summary.verdict(knowing(0.26, 0.25, low=-0.03, high=0.01))
    assert "distinguishable from chance (25%), where the original answers 26%, by chance as well" in verdict
    (number,) = (one for one in summary.key_numbers(knowing(0.26, 0.25)) if one.label.startswith("Common"))
    assert "not distinguishable from chance" in number.detail
