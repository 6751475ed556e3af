"""The shared key of a group as any linear map of all its rotary dims, best for the scores at all distances.

One complex number per rotary pair and head (`optimum.complex_pca`) is what commutes with RoPE, so it loses nothing to
positions, but it keeps one direction of each pair. Pairs of near frequencies turn almost alike over the distances that
attention reaches, the slow ones hardly at all: a direction that one pair has no room for can live in another (TransMLA,
arXiv 2502.07864, folds neighbouring frequencies in this way before its PCA). Here nothing is grouped by hand. With R_d
the rotation by distance d, the shared key E k and the queries' maps F_h minimise

    sum_d p(d) sum_h E[(q_h^T R_d k_h - (F_h q_h)^T R_d E k)^2],     p(d) ~ 1 / (1 + d) up to the window,

queries and keys being taken for independent. It is quadratic in E for given F and the other way round, and the means
over d are products by entry, so every step is one small solve. It starts at the optimum per pair and only goes down.

Legend: S heads of a group, R rotary dims (first all x, then all y), P = R / 2 pairs, N = S R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrofit.context.frequencies import of_layer
from retrofit.model.families import describe
from retrofit.model.spec import AttentionSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROUNDS = 8  # the tenth gains less than a hundredth of the first
_DISTANCES = 4096  # whose rotations exist at a time
_RIDGE = 1e-6  # of the mean eigenvalue: a Gram of little text is rank-deficient


@dataclass(frozen=True)
class RotationAverage:
    """Means over distances d of R_d X R_d^T, R_d the rotation of P pairs by d.

    minus_PP, plus_PP: complex means of e^{j (f_a - f_b) d} and e^{j (f_a + f_b) d}, f the frequencies.
    """

    minus_PP: Tensor
    plus_PP: Tensor

    @classmethod
    def over(cls, frequencies_P: np.ndarray, window: int) -> RotationAverage:
        """frequencies: radians per token. window: tokens that a query sees; p(d) ~ 1 / (1 + d) up to there."""
        angle_P = torch.from_numpy(np.asarray(frequencies_P, dtype=np.float64))
        minus_PP = torch.zeros(len(angle_P), len(angle_P), dtype=torch.complex128)
        plus_PP, total = minus_PP.clone(), 0.0
        for distance in torch.arange(window, dtype=torch.float64).split(_DISTANCES):
            share, turn_NP = 1 / (1 + distance), torch.exp(1j * distance[:, None] * angle_P)
            weighted = turn_NP * share[:, None]
            minus_PP += weighted.T @ turn_NP.conj()
            plus_PP += weighted.T @ turn_NP
            total += float(share.sum())
        return cls(minus_PP / total, plus_PP / total)

    def mean(self, x_RR: Tensor, *, back: bool = False) -> Tensor:
        """The mean of R X R^T, or of R^T X R (back), of a batch of matrices.

        The 2 x 2 block of two pairs is a complex number (which turns by the difference of their angles) plus one that
        conjugates (which turns by the sum).
        """
        p = len(self.minus_PP)
        xx, xy, yx, yy = x_RR[..., :p, :p], x_RR[..., :p, p:], x_RR[..., p:, :p], x_RR[..., p:, p:]
        minus, plus = (self.minus_PP.conj(), self.plus_PP.conj()) if back else (self.minus_PP, self.plus_PP)
        turned = torch.complex(xx + yy, yx - xy) * minus / 2
        mirrored = torch.complex(xx - yy, yx + xy) * plus / 2
        upper = torch.cat((turned.real + mirrored.real, mirrored.imag - turned.imag), -1)
        return torch.cat((upper, torch.cat((turned.imag + mirrored.imag, turned.real - mirrored.real), -1)), -2)


class RotationAverages:
    """The rotations of a model's layers, those that are alike once. config: the one that the converted model will be
    read with; spec: its description, where it is known."""

    def __init__(self, config: PretrainedConfig, spec: AttentionSpec | None = None) -> None:
        self._config, self._spec = config, spec or describe(config)
        self._known: dict[tuple[bytes, int], RotationAverage] = {}

    def of(self, index: int) -> RotationAverage | None:
        """Of layer `index`, where rotary pairs of its keys may share places: a norm fixes every head's magnitudes."""
        layer, positions = self._spec.layers[index], self._spec.max_position_embeddings
        if layer.rope is None or layer.qk_norm is not None:
            return None
        frequencies, window = of_layer(self._config, layer.rope), min(layer.window or positions, positions)
        key = (frequencies.tobytes(), window)
        if key not in self._known:
            self._known[key] = RotationAverage.over(frequencies, window)
        return self._known[key]


def fold_keys(
    gram_SRSR: Tensor, query_SRR: Tensor, encode_SRR: Tensor, turning: RotationAverage
) -> tuple[Tensor, Tensor, float, float]:
    """Improve a shared key: encode and query map [S, R, R] of each head, the lost and the whole energy of the scores.

    gram: E[k k^T] of the stacked heads. query: E[q q^T] summed over the query heads that read each. encode: where to
    start. The shared key keeps the mean energy of the heads' keys in every pair, so low precision is as safe as before.
    """
    s, r = gram_SRSR.shape[:2]
    gram_NN = gram_SRSR.flatten(2).flatten(0, 1)
    code_RN = encode_SRR.permute(1, 0, 2).flatten(1)
    scores_SRR = torch.empty_like(query_SRR)
    for round_ in range(_ROUNDS):
        if round_:
            weighed_SRR = scores_SRR.mT @ query_SRR
            curve_RR = turning.mean((weighed_SRR @ scores_SRR).sum(0), back=True)
            code_RN = _solve(curve_RR, turning.mean(weighed_SRR, back=True).permute(1, 0, 2).flatten(1))
        # What the codes of a query's group can tell of each head's key, at all distances.
        with_code_SRR = turning.mean((gram_NN @ code_RN.T).reshape(s, r, r))
        code_RR = turning.mean(code_RN @ gram_NN @ code_RN.T)
        scores_SRR = _solve(code_RR, with_code_SRR.mT).mT
    own_SRR = turning.mean(torch.stack([gram_SRSR[h, :, h] for h in range(s)]))
    whole = float((query_SRR * own_SRR).sum())
    kept = float((query_SRR * (2 * scores_SRR @ with_code_SRR.mT - scores_SRR @ code_RR @ scores_SRR.mT)).sum())
    scale_R1 = _scale(gram_SRSR, code_RN @ gram_NN @ code_RN.T)[:, None]
    encode = (code_RN * scale_R1).reshape(r, s, r).transpose(0, 1)
    return encode, (scores_SRR / scale_R1.T).mT, max(0.0, whole - kept), whole


def _solve(symmetric_RR: Tensor, right_RN: Tensor) -> Tensor:
    ridge = _RIDGE * symmetric_RR.diagonal().mean().clamp_min(1e-300)
    solved: Tensor = torch.linalg.solve(symmetric_RR + ridge * torch.eye(len(symmetric_RR)).to(right_RN), right_RN)
    return solved


def _scale(gram_SRSR: Tensor, code_RR: Tensor) -> Tensor:
    """[R], equal within a pair (so that it commutes with RoPE): to the heads' mean energy of that pair."""

    def energy(diagonal_R: Tensor) -> Tensor:
        return diagonal_R.reshape(2, -1).sum(0).clamp_min(1e-30)

    heads_R = torch.stack([gram_SRSR[h, :, h].diagonal() for h in range(len(gram_SRSR))]).mean(0)
    return (energy(heads_R) / energy(code_RR.diagonal())).sqrt().repeat(2)
