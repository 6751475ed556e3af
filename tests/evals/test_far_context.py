"""The attention of the benchmark of far keys against a softmax over what each query sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from evals.benchmarks import far_context
from evals.benchmarks.far_context import KEPT, Reading, attention

NEAR, TAIL, SEEN, DIM = 12, 6, 40, 8


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, hidden: bool) -> torch.Tensor:
    """[1, T, H, D]."""
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    row, key = torch.arange(SEEN - TAIL, SEEN)[:, None], torch.arange(SEEN)[None]
    far = (key >= KEPT) & (key < SEEN - TAIL - NEAR) if hidden else torch.zeros_like(key > row)
    scores = (q @ k.mT * scaling).masked_fill((key > row) | far, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("given", "hidden", "factor"),
    [
        (Reading(), False, 1.0),
        (Reading(near=NEAR, hidden=range(2, 4)), True, 1.0),
        (Reading(near=NEAR, hidden=range(3)), False, 1.0),
        (Reading(scale=[1, 1, 1, 1.3]), False, 1.3),
    ],
)
def test_a_tail_over_cached_keys(monkeypatch: pytest.MonkeyPatch, given: Reading, hidden: bool, factor: float) -> None:
    monkeypatch.setattr(far_context, "reading", given)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, TAIL, DIM, generator=generator)
    k, v = (torch.randn(1, 2, SEEN, DIM, generator=generator) for _ in range(2))
    out, _ = attention(SimpleNamespace(layer_idx=3), q, k, v, None, 0.4)
    torch.testing.assert_close(out, plain(q, k, v, 0.4 * factor, hidden))
