"""The gate passes what is measured and met, and nothing else."""

from __future__ import annotations

import pytest

from retrofit.errors import GateError, UserError
from retrofit.publishing.gate import check, enforce

METRICS = {"ppl@2048": 20.0, "ppl_ratio@2048": 1.5, "kv_ratio": 1 / 3, "ppl@2048/python-docs": float("nan")}


@pytest.mark.parametrize(
    ("metric", "bound", "passed"),
    [
        ("ppl_ratio@2048", "<= 1.5", True),
        ("ppl_ratio@2048", "< 1.5", False),
        ("ppl_ratio@2048", ">= 1.5", True),
        ("ppl_ratio@2048", "> 1.5", False),
        ("ppl@2048", "<=2e1", True),
        ("ppl@2048", "<= 19.999", False),
        ("kv_ratio", "<0.34", True),
    ],
)
def test_bounds(metric: str, bound: str, passed: bool) -> None:
    (result,) = check({metric: bound}, METRICS)
    assert result.passed is passed
    assert result.value == METRICS[metric]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bound", ["<= 5", ">= 0", "< 1e9", "> 0"])
def test_not_finite_never_passes(value: float, bound: str) -> None:
    assert not check({"ppl@1": bound}, {"ppl@1": value})[0].passed


def test_not_measured_and_not_readable_fail() -> None:
    missing, unreadable, dots = check({"ppl@4096": "<= 9", "kv_ratio": "about 1", "ppl@2048": "<= ."}, METRICS)
    assert not missing.passed
    assert "was not measured" in missing.reason
    assert "ppl@2048" in missing.reason
    assert not unreadable.passed
    assert "not a bound" in unreadable.reason
    assert not dots.passed


def test_enforce_lists_every_unmet_requirement() -> None:
    enforce([])
    enforce(check({"ppl@2048": "<= 20"}, METRICS))
    require = {"ppl@2048": "<= 10", "ppl@2048/python-docs": "<= 10", "tail_ppl@99": "<= 1", "kv_ratio": "<= 1"}
    with pytest.raises(GateError) as caught:
        enforce(check(require, METRICS))
    text = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert caught.value.exit_code == 2
    assert "3 of 4" in text
    assert "is 20, not <= 10" in text
    assert "nan" in text
    assert "tail_ppl@99" in text
    assert "kv_ratio" not in text
