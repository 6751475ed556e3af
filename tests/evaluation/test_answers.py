"""Answers to tasks: what the harness returns as one number a question, and two models paired on the same questions."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrofit.errors import UserError
from retrofit.evaluation.metrics.bootstrap import mean_interval
from retrofit.evaluation.tasks.answers import Score, TaskAnswers, changes, from_file, mcnemar, metrics_of, to_file
from retrofit.evaluation.tasks.harness_answers import answers_of, logged


def answers(right: list[float], *, name: str = "quiz", first: int = 0, metric: str = "acc", higher: bool = True) -> Any:
    """One metric; question i is called f"q{first + i}"."""
    value = sum(right) / len(right)
    asked = tuple(f"q{first + i}" for i in range(len(right)))
    return TaskAnswers(name, "1", 0, "0.4.13", asked, (Score(metric, value, 0.1, higher, tuple(right)),))


def test_the_difference_is_paired_question_by_question() -> None:
    before, after = [1, 1, 1, 0, 0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    (row,) = changes(answers(before), answers(after))
    assert (row.before, row.after) == (0.7, 0.5)
    assert row.change == pytest.approx(-0.2)
    assert row.drop == pytest.approx(0.2)
    assert (row.lost, row.gained) == (3, 1)
    # A plain bootstrap that draws questions with replacement.
    rng, difference = np.random.default_rng(1), np.array(after) - np.array(before)
    plain = [difference[rng.integers(10, size=10)].mean() for _ in range(20_000)]
    low, high = np.percentile(plain, [2.5, 97.5])
    assert (row.low, row.high) == (pytest.approx(low, abs=0.101), pytest.approx(high, abs=0.101))
    assert abs(np.mean(plain) - row.change) < 0.01


def test_the_same_answers_show_no_change_and_no_chance_of_one() -> None:
    (row,) = changes(answers([1, 0, 1]), answers([1, 0, 1]))
    assert (row.change, row.low, row.high, row.lost, row.gained, row.p) == (0, 0, 0, 0, 0, 1.0)


def test_a_loss_gets_worse_upwards() -> None:
    (row,) = changes(answers([2.0, 3.0], higher=False), answers([2.5, 3.5], higher=False))
    assert row.change == 0.5
    assert row.drop == 0.5
    assert row.p is None
    assert row.lost is None
    (error,) = changes(answers([0, 1, 0], higher=False), answers([1, 1, 0], higher=False))
    assert (error.lost, error.gained) == (1, 0)
    assert error.drop == pytest.approx(1 / 3)


def test_only_questions_that_both_were_asked_are_paired() -> None:
    (row,) = changes(answers([1, 1, 0, 0]), answers([0, 1, 1], first=2))
    assert row.questions == 2
    assert (row.before, row.after) == (0.0, 0.5)
    assert changes(answers([1, 1]), answers([1, 1], first=2)) == []
    assert changes(answers([1, 1]), answers([1, 1], metric="f1")) == []


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 1), (5, 5), (12, 2), (0, 9)])
def test_mcnemar_is_the_exact_test_of_a_fair_coin(lost: int, gained: int) -> None:
    n = lost + gained
    outcomes = [sum(throws) for throws in itertools.product((0, 1), repeat=n)]
    as_far = sum(abs(heads - n / 2) >= abs(lost - n / 2) for heads in outcomes)
    assert mcnemar(lost, gained) == pytest.approx(as_far / 2**n)


def test_mcnemar_of_many_questions_does_not_overflow() -> None:
    assert mcnemar(6000, 6000) == 1.0
    assert 0 <= mcnemar(9000, 1000) < 1e-300


def test_the_interval_of_a_mean_is_that_of_a_bootstrap_over_units() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = mean_interval(values, "question", resamples=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.units == 400
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_requirements_name_the_first_metric_or_any() -> None:
    def of(acc: list[float], f1: float) -> dict[str, TaskAnswers]:
        one = answers(acc)
        return {"quiz": TaskAnswers(**{**vars(one), "scores": (*one.scores, Score("f1", f1, None, True))})}

    found = metrics_of([of([1, 1, 1, 0], 0.9), of([0, 0, 0, 0], 0.1), of([1, 0, 1, 0], 0.7)])
    assert found == {
        "task@quiz": 0.5, "task@quiz/acc": 0.5, "task@quiz/f1": 0.7,
        "task_drop@quiz": 0.25, "task_drop@quiz/acc": 0.25,
    }  # fmt: skip


def test_answers_come_back_from_their_file(tmp_path: Path) -> None:
    one = answers([1, 0, 1])
    to_file({"quiz": one}, tmp_path / "a" / "quiz.json")
    assert from_file(tmp_path / "a" / "quiz.json") == {"quiz": one}
    (tmp_path / "b.json").write_text(json.dumps({"format": 99, "tasks": {}}))
    with pytest.raises(UserError, match="format 99"):
        from_file(tmp_path / "b.json")


def sample(doc: int, kept: str = "none", **metrics: object) -> dict[str, object]:
    hashes = {"doc_hash": f"d{doc}", "prompt_hash": f"p{doc}", "target_hash": "t"}
    return {"doc_id": doc, "filter": kept, "metrics": list(metrics), **hashes, **metrics}


def returned(results: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
    """What `simple_evaluate` returns, as far as it is read."""
    return {
        "results": results,
        "samples": samples,
        "n-shot": dict.fromkeys(samples, 2),
        "versions": dict.fromkeys(samples, 1.0),
        "higher_is_better": {part: {"acc": True, "ppl": False} for part in samples},
    }


def test_one_number_a_question_where_the_score_is_their_mean() -> None:
    scores = {"alias": "quiz", "acc,none": 0.5, "acc_stderr,none": 0.5, "ppl,none": 7.0, "ppl_stderr,none": "N/A"}
    samples = [sample(1, acc=0.0, ppl=(1.0, 2)), sample(0, acc=1.0, ppl=(3.0, 2))]
    found = answers_of("quiz", returned({"quiz": scores}, {"quiz": samples}), "0.4.13")
    acc, ppl = found.scores
    assert acc == Score("acc", 0.5, 0.5, True, (1.0, 0.0))
    assert ppl == Score("ppl", 7.0, None, False, None)
    assert len(set(found.asked)) == 2
    assert found.fewshot == 2
    other = answers_of(
        "quiz", returned({"quiz": scores}, {"quiz": [{**samples[0], "prompt_hash": "x"}, samples[1]]}), ""
    )
    assert other.asked[0] == found.asked[0]
    assert other.asked[1] != found.asked[1]


def test_every_filter_of_a_task_is_a_metric() -> None:
    scores = {"em,strict": 0.0, "em_stderr,strict": 0.0, "em,loose": 0.5, "em_stderr,loose": 0.1}
    samples = [sample(i, kept, em=float(kept == "loose" and i)) for kept in ("strict", "loose") for i in (0, 1)]
    found = answers_of("math", returned({"math": scores}, {"math": samples}), "")
    assert [(one.metric, one.questions) for one in found.scores] == [("em,strict", (0, 0)), ("em,loose", (0, 1))]
    assert len(found.asked) == 2


def test_the_questions_of_a_group_stand_together() -> None:
    parts = {"a": [sample(0, acc=1.0)], "b": [sample(0, acc=0.0), sample(1, acc=0.0)]}
    results = {"a": {"acc,none": 1.0, "acc_stderr,none": "N/A"}, "b": {"acc,none": 0.0, "acc_stderr,none": 0.0}}
    group = {"all": {"acc,none": 0.4, "acc_stderr,none": 0.2}}
    (own,) = answers_of("all", returned({**results, **group}, parts), "").scores
    assert own == Score("acc", 0.4, 0.2, True, (1, 0, 0))  # the harness's own mean over tasks, its weights
    (tag,) = answers_of("all", returned(results, parts), "").scores
    assert tag.value == pytest.approx(1 / 3)
    assert tag.stderr == pytest.approx(1 / 3)
    assert len(set(answers_of("all", returned(results, parts), "").asked)) == 3


class Short:
    """A window that does not hold the prompts of some questions. cuts: whether those are cut or not asked."""

    def __init__(self, long: set[int], *, cuts: bool) -> None:
        self.long, self.cuts = long, cuts

    def skipped(self, sample: Any) -> bool:
        return not self.cuts and sample["doc_id"] in self.long

    def cut_to(self, sample: Any) -> int | None:
        return 64 if sample["doc_id"] in self.long else None


def test_questions_that_were_not_asked_count_in_no_score() -> None:
    scores = {"acc,none": 0.5, "acc_stderr,none": 0.5, "ppl,none": 7.0, "ppl_stderr,none": "N/A"}
    samples = [sample(0, acc=1.0, ppl=(3.0, 2)), sample(1, acc=0.0, ppl=(0.0, 2))]
    whole = answers_of("quiz", returned({"quiz": scores}, {"quiz": samples}), "")
    found = answers_of("quiz", returned({"quiz": scores}, {"quiz": samples}), "", Short({1}, cuts=False))
    assert found.not_asked == 1
    assert found.asked == whole.asked[:1]
    assert [(one.metric, one.value, one.questions) for one in found.scores] == [("acc", 1.0, (1.0,))]
    (row,) = changes(found, whole)
    assert row.questions == 1
    none = answers_of("quiz", returned({"quiz": scores}, {"quiz": samples}), "", Short({0, 1}, cuts=False))
    assert (none.asked, none.scores, none.not_asked) == ((), (), 2)
    assert none.rows() == ()


def test_a_question_that_was_cut_is_paired_with_none_that_was_read_whole() -> None:
    results, samples = {"acc,none": 0.5}, [sample(0, acc=1.0), sample(1, acc=0.0)]
    whole = answers_of("quiz", returned({"quiz": results}, {"quiz": samples}), "")
    cut = answers_of("quiz", returned({"quiz": results}, {"quiz": samples}), "", Short({1}, cuts=True))
    assert cut.not_asked == 0
    assert set(cut.asked) & set(whole.asked) == {whole.asked[0]}


def test_metrics_of_other_lengths_as_ruler_has_them() -> None:
    results = {"4096,none": 0.5, "8192,none": 1.0, "16384,none": -1.0}
    samples = [
        sample(0, **{"4096": 0.0}),
        sample(1, **{"4096": 1.0}),
        sample(2, **{"4096": -1.0, "8192": 1.0}),
    ]
    found = answers_of("vt", returned({"vt": results}, {"vt": samples}), "")
    assert [(one.metric, one.questions) for one in found.scores] == [
        ("4096", (0.0, 1.0, None)),
        ("8192", (None, None, 1.0)),
    ]
    assert [row.questions for row in found.rows()] == [2, 1]
    assert [row.questions for row in changes(found, found)] == [2, 1]


def test_samples_are_lines_of_ascii_whatever_a_model_writes() -> None:
    one = {
        **sample(0, acc=1.0),
        "arguments": [("Gr\u00fc\u00dfe?", " ja")],
        "target": 0,
        "filtered_resps": ["\x1b[31m\u202e"],
    }
    (line,) = logged("quiz", returned({"quiz": {}}, {"quiz": [one]}))
    assert line.isascii()
    assert "\x1b" not in line
    assert json.loads(line)["answers"] == ["\x1b[31m\u202e"]
    assert json.loads(line)["metrics"] == {"acc": 1.0}
