"""Chunked losses against the plain formulas, in value and gradient, and against the logits of real architectures."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from retrofit.recipe.recovery import Divergence
from retrofit.recovery.objectives import IGNORED, Head, distill_loss, lm_loss
from retrofit.recovery.student_teacher import head_of, hidden_states
from tests.tiny import FAMILIES, tiny_model

N, C, V = 21, 12, 40
SHAPES = [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)]


def tensors(seed: int, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    return hidden, weight, torch.randn(V, generator=generator).requires_grad_() if bias else None


def plain_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum()


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(3 * loss, [x for x in inputs if x is not None]))


@pytest.mark.parametrize("rows", [1, 8, 21, 64])
@pytest.mark.parametrize(("scale", "softcap"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_distillation_is_the_plain_formula(rows: int, scale: float, softcap: float | None, bias: bool) -> None:
    hidden, weight, offset = tensors(0, bias)
    other, other_weight, other_offset = (None if x is None else x.detach() for x in tensors(1, bias))
    assert other is not None
    assert other_weight is not None
    student = Head(weight, offset, scale, softcap)
    teacher = Head(other_weight, other_offset, scale, softcap)
    expected = plain_kl(plain_logits(hidden, student), plain_logits(other, teacher))
    actual = distill_loss(hidden, student, other, teacher, rows)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = [hidden, weight, offset]
    for got, want in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-5)


def plain_divergence(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    s, t = student.softmax(-1), teacher.softmax(-1)
    m = (s + t) / 2
    sums = {"reverse": s * (s / t).log(), "jsd": (t * (t / m).log() + s * (s / m).log()) / 2}
    return sums[name].sum()


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize(("scale", "softcap"), SHAPES)
@pytest.mark.parametrize("name", ["reverse", "jsd"])
def test_other_divergences_are_their_formulas(name: Divergence, rows: int, scale: float, softcap: float | None) -> None:
    hidden, weight, offset = tensors(0, True)
    other, other_weight, _ = (None if x is None else x.detach() for x in tensors(1, False))
    assert other is not None
    assert other_weight is not None
    student, teacher = Head(weight, offset, scale, softcap), Head(other_weight, None, scale, softcap)
    counted = torch.arange(N) % 3 != 0
    logits = [plain_logits(h, head)[counted] for h, head in ((hidden, student), (other, teacher))]
    expected = plain_divergence(name, *logits)
    actual = distill_loss(hidden, student, other, teacher, rows, ~counted, name)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        assert distill_loss(hidden, student, other, teacher, rows, ~counted, name).item() == pytest.approx(
            actual.item()
        )
    inputs = [hidden, weight, offset]
    for got, want in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", get_args(Divergence))
def test_a_token_that_the_teacher_rules_out_has_a_finite_gradient(name: Divergence) -> None:
    """With logits as far apart as float32 allows a softmax."""
    hidden = torch.tensor([[80.0, -80.0]]).requires_grad_()
    head = Head(torch.eye(2))
    loss = distill_loss(hidden, head, -hidden.detach(), head, 8, None, name)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize(("scale", "softcap"), SHAPES)
def test_language_model_loss_is_cross_entropy(rows: int, scale: float, softcap: float | None) -> None:
    hidden, weight, offset = tensors(0, True)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    head = Head(weight, offset, scale, softcap)
    expected = torch.nn.functional.cross_entropy(plain_logits(hidden, head), labels, reduction="sum")
    actual = lm_loss(hidden, head, labels, rows)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = [hidden, weight, offset]
    for got, want in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-5)


def test_the_same_model_twice_has_no_loss_and_no_gradient() -> None:
    hidden, weight, _ = tensors(0, False)
    loss = distill_loss(hidden, Head(weight.detach()), hidden.detach(), Head(weight.detach()), 8)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(loss.item()) < 1e-5
    assert gradient.abs().max() < 1e-5


def test_a_frozen_head_gets_no_gradient_and_nothing_is_made_without_grad() -> None:
    hidden, weight, _ = tensors(0, False)
    weight = weight.detach()
    distill_loss(hidden, Head(weight), hidden.detach() + 1, Head(weight), 8).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        assert not distill_loss(hidden, Head(weight), hidden + 1, Head(weight), 8).requires_grad


def test_bfloat16_is_near_the_formula() -> None:
    hidden, weight, _ = tensors(0, False)
    low, other = hidden.detach().bfloat16().requires_grad_(), (hidden.detach() + 0.3).bfloat16()
    head = Head(weight.detach().bfloat16())
    loss = distill_loss(low, head, other, head, 8)
    expected = plain_kl(plain_logits(low, head), plain_logits(other, head))
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    got, want = torch.autograd.grad(loss, low)[0].float(), torch.autograd.grad(expected, low)[0].float()
    assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_every_family_gives_the_logits_of_its_class(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        labels = torch.roll(ids[0], 1)
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0], labels, reduction="sum")
        actual = lm_loss(hidden_states(model, ids)[0], head_of(model), labels, 5)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["distill", "lm"])
def test_tokens_that_do_not_count_change_neither_loss_nor_gradient(kind) -> None:
    torch.manual_seed(0)
    hidden, target = torch.randn(10, 8), torch.randn(10, 8)
    head = Head(torch.randn(20, 8))
    labels = torch.randint(0, 20, (10,))
    counted = torch.arange(10) % 3 != 1

    def loss(rows: torch.Tensor, ignored: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        student = hidden[rows].clone().requires_grad_()
        if kind == "distill":
            value = distill_loss(student, head, target[rows], head, 4, ignored)
        else:
            value = lm_loss(student, head, labels[rows] if ignored is None else labels.where(~ignored, IGNORED), 4)
        value.backward()
        assert student.grad is not None
        return value.detach(), student.grad

    some, gradient = loss(counted, None)
    all_, full = loss(torch.ones(10, dtype=torch.bool), ~counted)
    torch.testing.assert_close(all_, some)
    torch.testing.assert_close(full[counted], gradient)
    assert not full[~counted].any()


def test_rows_of_which_nothing_counts_have_no_loss_and_a_gradient_of_zero() -> None:
    """A process without a row of a step takes part in the exchange of gradients all the same."""
    student = torch.randn(6, 8, requires_grad=True)
    head = Head(torch.randn(20, 8))
    loss = distill_loss(student, head, torch.randn(6, 8), head, 4, torch.ones(6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()
