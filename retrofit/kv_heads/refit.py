"""Refitting the output projection on the converted stream: a ridge regression towards the merged weights.

After the merge of a layer, its head outputs z (on the stream that the converted layers before it produce) no longer
give what the original attention gave. The least-squares output projection under z, with the error so far in its
target,

    Y* = attn(X) + beta (X - X~),   W = W_0 + (C - W_0 G) (G + lambda I)^{-1},   G = sum w z z^T,  C = sum w Y* z^T,

also undoes drift of the layers before. Tokens weigh 1 / mean(x^2), so that the few with massive activations do not
own the fit. A ridge overfits, its own text and its own kind of text. Sums are therefore kept by kind and by part of
each kind: lambda is the best on parts that a trial fit did not see, among those that also help every kind of text
that a trial fit did not see; where none does, the merged weights stay. All of it is arithmetic on the sums.

Legend: T tokens, N columns (H D, and one of ones where there is a bias), C model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAMBDAS = tuple(10.0 ** (e / 2) for e in range(-8, 5))  # times the mean eigenvalue of the Gram


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
        """Sums of a chunk of tokens, on the CPU wherever the model runs."""
        weighted_NT = (z_TN * weight_T[:, None]).T
        return cls(
            (weighted_NT @ z_TN).double().cpu(),
            (weighted_NT @ target_TC).T.double().cpu(),
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
    """Outcome of a refit.

    accepted: False where no lambda passed; w is then the start. strength: the chosen lambda over the Gram's mean
    eigenvalue. held_out_before/after: error on text the fit did not see, as a share of the target's energy, averaged
    over kinds of text.
    """

    w_CN: Tensor
    accepted: bool
    strength: float | None
    held_out_before: float
    held_out_after: float


def _steps(sums: RidgeSums, start_CN: Tensor) -> list[Tensor]:
    """W - W_0 of the ridge for each of LAMBDAS, from one eigendecomposition, fp32."""
    values, vectors = torch.linalg.eigh(sums.gram_NN)
    values = values.clamp_min(0)
    scale = values.mean().clamp_min(1e-300)
    residual = ((sums.cross_CN - start_CN @ sums.gram_NN) @ vectors).float()
    basis = vectors.T.float().contiguous()
    return [(residual / (values + lam * scale).float()) @ basis for lam in LAMBDAS]


def _ratios(steps: list[Tensor], held_out: RidgeSums, start_CN: Tensor) -> Tensor:
    """Error on `held_out` after each step over the error at the start, [lambdas]."""
    gram = held_out.gram_NN.float()
    residual = (held_out.cross_CN - start_CN @ held_out.gram_NN).float()
    before = max(held_out.error(start_CN) * held_out.weight, 1e-300)
    gains = [float(((step @ gram) * step).sum()) - 2 * float((step * residual).sum()) for step in steps]
    return (1 + torch.tensor(gains, dtype=torch.float64) / before).clamp_min(1e-12)


def _total(parts: list[RidgeSums]) -> RidgeSums:
    return sum(parts[1:], parts[0])


def refit(sums: Mapping[tuple[str, int], RidgeSums], start_CN: Tensor) -> Ridge:
    """Choose lambda on text left out, then fit on all.

    sums: by (kind of text, part of it); at least two parts of each kind.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in sums))
    parts = sorted({part for _, part in sums})
    assert len(parts) >= 2, "a repair is never accepted on the text it was fitted on"
    unseen_text, unseen_kind, before = [], [], []
    for part in parts:
        steps = _steps(_total([s for (_, p), s in sums.items() if p != part]), start_CN)
        for held_out in (s for (_, p), s in sums.items() if p == part):
            unseen_text.append(_ratios(steps, held_out, start_CN))
            before.append(held_out.error(start_CN) * held_out.weight / max(held_out.energy, 1e-300))
    for kind in kinds if len(kinds) > 1 else []:
        steps = _steps(_total([s for (k, _), s in sums.items() if k != kind]), start_CN)
        unseen_kind.append(_ratios(steps, _total([s for (k, _), s in sums.items() if k == kind]), start_CN))
    within = torch.stack(unseen_text)
    helps = torch.cat([within, *(r[None] for r in unseen_kind)]).amax(0) < 1.0
    share = sum(before) / len(before)
    if not bool(helps.any()):
        return Ridge(start_CN, False, None, share, share)
    best = int(within.log().mean(0).masked_fill(~helps, torch.inf).argmin())
    after = sum(b * float(r) for b, r in zip(before, within[:, best], strict=True)) / len(before)
    step = _steps(_total(list(sums.values())), start_CN)[best]
    return Ridge(start_CN + step, True, LAMBDAS[best], share, after)
