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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.system.world import World

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
    def nothing(cls, columns: int, width: int) -> RidgeSums:
        """Sums of no tokens, N columns and C wide."""
        gram_NN, cross_NC = (torch.zeros(columns, size, dtype=torch.float64) for size in (columns, width))
        return cls(gram_NN, cross_NC.T, 0.0, 0.0)  # laid out as in `of`: memory is added up over processes as it lies

    def together(self, world: World) -> RidgeSums:
        """Those of all processes, each of which has sums of its own tokens; these are used up."""
        scalars = world.gather((self.energy, self.weight))
        energy, weight = (sum(values) for values in zip(*scalars, strict=True))
        return RidgeSums(world.sum_(self.gram_NN), world.sum_(self.cross_CN), energy, weight)

    def to(self, device: str) -> RidgeSums:
        """The same on a device."""
        return RidgeSums(self.gram_NN.to(device), self.cross_CN.to(device), self.energy, self.weight)

    @classmethod
    def of(cls, z_TN: Tensor, target_TC: Tensor, weight_T: Tensor) -> RidgeSums:
        """Sums of a chunk of tokens, on the CPU wherever the model runs."""
        weighted_NT = (z_TN * weight_T[:, None]).T
        return cls(
            (weighted_NT @ z_TN).cpu().double(),
            (weighted_NT @ target_TC).T.cpu().double(),
            float((target_TC.square().sum(1) * weight_T).cpu().sum(dtype=torch.float64)),
            float(weight_T.cpu().sum(dtype=torch.float64)),
        )

    def residual(self, w_CN: Tensor) -> Tensor:
        """C - W G, what the gradient of the squared error is made of."""
        return self.cross_CN - w_CN @ self.gram_NN

    def squared_error(self, w_CN: Tensor, residual_CN: Tensor) -> float:
        """Weighted squared error of `w` on these tokens, whose residual is R: energy - tr(W (C + R)^T)."""
        return max(self.energy - float((w_CN * (self.cross_CN + residual_CN)).sum()), 0.0)


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


@dataclass(frozen=True)
class _Solution:
    """The ridge for every lambda at once, from one eigendecomposition G = V diag(e) V^T:

    W - W_0 = A diag(d) V^T,   A = (C - W_0 G) V,   d = 1 / (e + lambda mean(e)).
    """

    values_N: Tensor
    vectors_NN: Tensor
    residual_CN: Tensor  # A, fp32

    @classmethod
    def of(cls, sums: RidgeSums, start_CN: Tensor) -> _Solution:
        values, vectors = torch.linalg.eigh(sums.gram_NN)
        return cls(values.clamp_min(0), vectors, (sums.residual(start_CN) @ vectors).float())

    def damped(self, strength: float) -> Tensor:
        """Eigenvalues and lambda, [N]."""
        return self.values_N + strength * self.values_N.mean().clamp_min(1e-300)

    def step(self, strength: float) -> Tensor:
        """W - W_0, fp32."""
        return (self.residual_CN / self.damped(strength).float()) @ self.vectors_NN.T.float()

    def on_unseen(self, held_out: RidgeSums, start_CN: Tensor) -> tuple[float, Tensor]:
        """Squared error on `held_out` at the start, as a share of its target's energy, and for each of LAMBDAS what
        part of it the step leaves.

        With S the step and R the start's residual there, tr(S G S^T) = d^T (V^T G V * A^T A) d and
        tr(S R^T) = d . colsum(A * R V): no step is written out.
        """
        vectors, a_CN = self.vectors_NN.float(), self.residual_CN
        residual_CN = held_out.residual(start_CN)
        before = held_out.squared_error(start_CN, residual_CN)
        linear_N = (a_CN * (residual_CN.float() @ vectors)).sum(0, dtype=torch.float64)
        square_NN = (vectors.T @ (held_out.gram_NN.float() @ vectors)).mul_(a_CN.T @ a_CN).double()
        inverse_LN = torch.stack([1 / self.damped(strength) for strength in LAMBDAS])
        gain_L = ((inverse_LN @ square_NN) * inverse_LN).sum(1) - 2 * inverse_LN @ linear_N
        return before / max(held_out.energy, 1e-300), (1 + gain_L / max(before, 1e-300)).clamp_min(1e-12)


def _total(parts: list[RidgeSums]) -> RidgeSums:
    return sum(parts[1:], parts[0])


def refit(
    sums: Mapping[tuple[str, int], RidgeSums],
    start_CN: Tensor,
    device: str = "cpu",
    *,
    guards: Sequence[RidgeSums] = (),
) -> Ridge:
    """Choose lambda on text left out, then fit on all.

    sums: by (kind of text, part of it); at least two parts of each kind. guards: of tokens that are never fitted to,
    and that no lambda may make worse. device: where the arithmetic is done; the result is on the CPU.
    """
    sums, start_CN = {fold: part.to(device) for fold, part in sums.items()}, start_CN.to(device)
    kinds = list(dict.fromkeys(kind for kind, _ in sums))
    parts = sorted({part for _, part in sums})
    assert len(parts) >= 2, "a repair is never accepted on the text it was fitted on"
    unseen_text, unseen_kind, before = [], [], []
    for part in parts:
        trial = _Solution.of(_total([s for (_, p), s in sums.items() if p != part]), start_CN)
        for held_out in (s for (_, p), s in sums.items() if p == part):
            at_start, ratio_L = trial.on_unseen(held_out, start_CN)
            before.append(at_start)
            unseen_text.append(ratio_L)
    for kind in kinds if len(kinds) > 1 else []:
        trial = _Solution.of(_total([s for (k, _), s in sums.items() if k != kind]), start_CN)
        held_out = _total([s for (k, _), s in sums.items() if k == kind])
        unseen_kind.append(trial.on_unseen(held_out, start_CN)[1])
    whole = _Solution.of(_total(list(sums.values())), start_CN)
    unseen_kind += [whole.on_unseen(guard.to(device), start_CN)[1] for guard in guards]
    within = torch.stack(unseen_text)
    helps = torch.cat([within, *(r[None] for r in unseen_kind)]).amax(0) < 1.0
    share = sum(before) / len(before)
    if not bool(helps.any()):
        return Ridge(start_CN.cpu(), False, None, share, share)
    best = int(within.log().mean(0).masked_fill(~helps, torch.inf).argmin())
    after = sum(b * float(r) for b, r in zip(before, within[:, best], strict=True)) / len(before)
    return Ridge((start_CN + whole.step(LAMBDAS[best])).cpu(), True, LAMBDAS[best], share, after)
