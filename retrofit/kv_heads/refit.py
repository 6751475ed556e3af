"""Refitting the output projection on the converted stream: a ridge regression towards the merged weights.

After the merge of a layer, its head outputs z (on the stream that the converted layers before it produce) no longer
give what the original attention gave. The least-squares output projection under z, with the error so far in its
target,

    Y* = attn(X) + beta (X - X~),   W = W_0 + (C - W_0 G) (G + lambda I)^{-1},   G = sum w z z^T,  C = sum w Y* z^T,

also undoes drift of the layers before. Tokens weigh 1 / mean(x^2), so that the few with massive activations do not
own the fit. A ridge overfits its own kind of text, so lambda is chosen, and the repair accepted at all, on kinds of
text that a trial fit never saw: Grams are kept per kind, and each kind in turn is held out. All of it is arithmetic
on the Grams.

Legend: T tokens, N columns (H D, and one of ones where there is a bias), C model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAMBDAS = tuple(10.0 ** (e / 2) for e in range(-10, 5))  # times the mean eigenvalue of the Gram


@dataclass(frozen=True)
class RidgeSums:
    """Weighted sums over the tokens of one kind of text, float64: G [N, N], C [C, N], the target's energy, the
    weights."""

    gram_NN: Tensor
    cross_CN: Tensor
    energy: float
    weight: float

    def __add__(self, other: RidgeSums) -> RidgeSums:
        return RidgeSums(
            self.gram_NN + other.gram_NN,
            self.cross_CN + other.cross_CN,
            self.energy + other.energy,
            self.weight + other.weight,
        )

    @classmethod
    def of(cls, z_TN: Tensor, target_TC: Tensor, weight_T: Tensor) -> RidgeSums:
        """Sums of a chunk of tokens."""
        weighted_NT = (z_TN * weight_T[:, None]).T
        return cls(
            (weighted_NT @ z_TN).double(),
            (weighted_NT @ target_TC).T.double(),
            float((target_TC.square().sum(1) * weight_T).sum(dtype=torch.float64)),
            float(weight_T.sum(dtype=torch.float64)),
        )

    def error(self, w_CN: Tensor) -> float:
        """Weighted mean squared error of `w` on these tokens: tr(W G W^T) - 2 tr(W C^T) + energy, per unit of
        weight."""
        fitted = float(((w_CN @ self.gram_NN) * w_CN).sum()) - 2 * float((w_CN * self.cross_CN).sum())
        return max(fitted + self.energy, 0.0) / self.weight


@dataclass(frozen=True)
class Ridge:
    """Outcome of a refit. held_out_before/after: error on kinds of text that the fit did not see, as a share of the
    target's energy, averaged over kinds. `accepted` is False where no lambda improved every kind; w is then the
    start."""

    w_CN: Tensor
    accepted: bool
    strength: float | None
    held_out_before: float
    held_out_after: float


def _solutions(sums: RidgeSums, start_CN: Tensor) -> list[Tensor]:
    """The ridge solution for each of LAMBDAS, from one eigendecomposition."""
    values, vectors = torch.linalg.eigh(sums.gram_NN)
    scale = values.clamp_min(0).mean().clamp_min(1e-300)
    residual = (sums.cross_CN - start_CN @ sums.gram_NN) @ vectors
    return [start_CN + (residual / (values.clamp_min(0) + lam * scale)) @ vectors.T for lam in LAMBDAS]


def refit(kinds: list[RidgeSums], start_CN: Tensor) -> Ridge:
    """Choose lambda by leaving each kind of text out in turn, then fit on all kinds. Needs at least two."""
    assert len(kinds) >= 2, "a repair is never accepted on the text it was fitted on"
    ratios, before = torch.zeros(len(LAMBDAS), len(kinds), dtype=torch.float64), []
    for i, held_out in enumerate(kinds):
        fitted_on = [k for j, k in enumerate(kinds) if j != i]
        total = sum(fitted_on[1:], fitted_on[0])
        start_error = max(held_out.error(start_CN), 1e-300)
        before.append(start_error * held_out.weight / max(held_out.energy, 1e-300))
        for row, w in enumerate(_solutions(total, start_CN)):
            ratios[row, i] = held_out.error(w) / start_error
    best = int(ratios.log().mean(1).argmin())
    share = sum(before) / len(before)
    if float(ratios[best].max()) >= 1.0:
        return Ridge(start_CN, False, None, share, share)
    after = sum(b * float(r) for b, r in zip(before, ratios[best], strict=True)) / len(before)
    total = sum(kinds[1:], kinds[0])
    return Ridge(_solutions(total, start_CN)[best], True, LAMBDAS[best], share, after)
