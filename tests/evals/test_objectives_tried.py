"""The trials of objectives: the loss on few logits against its formula, averages, and what is said to pay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evals.benchmarks.objectives import KINDS
from evals.benchmarks.objectives_loop import TopTokens, added
from evals.benchmarks.objectives_tried import judgement

VOCABULARY = 50


def by_formula(log_t: Tensor, index: Tensor, logits: Tensor, rest: bool) -> Tensor:
    """KL over the k tokens and any other one, or over the k tokens alone."""
    if not rest:
        log_t, log_s = log_t.log_softmax(-1), logits.gather(1, index).log_softmax(-1)
        return (log_t.exp() * (log_t - log_s)).sum()
    s, t = logits.softmax(-1).gather(1, index), log_t.exp()
    rest_s, rest_t = 1 - s.sum(-1), 1 - t.sum(-1)
    return (t * (t / s).log()).sum() + (rest_t * (rest_t / rest_s).log()).sum()


@pytest.mark.parametrize("rest", [True, False])
def test_gradient_on_few_logits(rest: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, VOCABULARY, requires_grad=True)
    log_t, index = torch.randn(7, VOCABULARY).log_softmax(-1).topk(5)
    wanted = by_formula(log_t, index, logits, rest)
    (expected,) = torch.autograd.grad(wanted, logits)

    rule = TopTokens(log_t, index, rest)
    rule.begin(0, 7)
    loss, gradient = rule(slice(0, 7), logits.detach(), True)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("rest", [True, False])
def test_the_teacher_itself_has_no_loss(rest: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY)
    log_t, index = logits.log_softmax(-1).topk(5)
    loss, gradient = TopTokens(log_t, index, rest)(slice(0, 4), logits, True)
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(logits), atol=1e-5, rtol=0)


def test_average_of_weights() -> None:
    steps = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    total = None
    for weights in steps:
        total = added(total, weights, 2)
    assert total is not None
    torch.testing.assert_close(total["a"], torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(steps[0]["a"], torch.tensor([1.0, 2.0]))


def result(novels: float, seconds: float, code: float = 2.0) -> dict[str, object]:
    return {"losses": {kind: 2.0 for kind in KINDS} | {"novels": novels, "code": code}, "cpu_seconds": seconds}


def test_what_pays() -> None:
    control = result(3.0, 100)
    assert judgement(result(2.95, 100), control) == "pays: novels -4.9%, seconds +0%"
    assert judgement(result(2.98, 100), control) == "does not pay: novels -2.0%, seconds +0%"
    assert judgement(result(2.95, 120), control) == "does not pay: novels -4.9%, seconds +20%"
    assert judgement(result(2.95, 100, code=2.05), control).startswith("does not pay")
