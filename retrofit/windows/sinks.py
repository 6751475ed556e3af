"""The best sink of every head under every window, and what is lost with it: arithmetic on moments.

Legend: W windows, H query heads, D head dim, N nodes of the grid of log-sum-exps, S sinks that are tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.windows.moments import FAR, NEAR, STEP, WindowMoments, nodes

NONE = -torch.inf
"""The logit of no sink."""
FINER = 15
"""Sinks are found to a node of the grid, then to a fraction of its step."""


@dataclass(frozen=True)
class SinkFit:
    """Sinks and what is lost with them, for each window and head, float64.

    sinks_WH: logits, -inf for none. near_WH, far_WH: weighted energy of the error of the output projection's result, a
    mean over all tokens; their sum is what is lost in all. bare_WH: the same sum without any sink. full_WH: energy of
    the whole output. mean_WHD: weighted mean of what is lost.
    """

    sinks_WH: Tensor
    near_WH: Tensor
    far_WH: Tensor
    bare_WH: Tensor
    full_WH: Tensor
    mean_WHD: Tensor

    @property
    def lost_WH(self) -> Tensor:
        """Energy of the error on all tokens."""
        return self.near_WH + self.far_WH


def fit_sinks(moments: WindowMoments, *, sinks: bool = True, centred: bool = False) -> SinkFit:
    """The sink with the least error for every window and head, or none where none is no worse.

    sinks: False for a target that has none. centred: the target has a bias that takes the mean of what is lost.
    """
    bare_WH = _error(moments, moments.cross_2WHN.new_full(moments.mass_WH.shape, NONE), centred).sum(0)
    best_WH, chosen_WH = bare_WH.clone(), torch.full_like(bare_WH, NONE)
    coarse = [node.expand_as(bare_WH) for node in nodes()] if sinks else []
    for candidates in (coarse, range(-FINER, FINER + 1) if sinks else ()):
        around_WH = chosen_WH.clone()
        for candidate in candidates:
            sinks_WH = candidate if isinstance(candidate, Tensor) else around_WH + candidate * STEP / FINER
            error_WH = _error(moments, sinks_WH, centred).sum(0)
            better_WH = error_WH < best_WH * (1 - 1e-9)
            best_WH = torch.where(better_WH, error_WH, best_WH)
            chosen_WH = torch.where(better_WH, sinks_WH, chosen_WH)
    return evaluate_sinks(moments, chosen_WH, centred=centred)


def evaluate_sinks(moments: WindowMoments, sinks_WH: Tensor, *, centred: bool = False) -> SinkFit:
    """What is lost with given sinks, for example those of other text."""
    none_WH = torch.full_like(sinks_WH, NONE)
    error_2WH = _error(moments, sinks_WH, centred)
    return SinkFit(
        sinks_WH=sinks_WH,
        near_WH=error_2WH[NEAR],
        far_WH=error_2WH[FAR],
        bare_WH=_error(moments, none_WH, centred).sum(0),
        full_WH=moments.full_2WH.sum(0),
        mean_WHD=_mean_lost(moments, sinks_WH),
    )


def given_back(moments: WindowMoments, fit: SinkFit, o_CHD: Tensor) -> Tensor:
    """What the output projection makes of the mean of what is lost under the only window, [C], float64: with it in a
    bias the error has no mean any more. The mean is by the tokens' weights, as the error is."""
    [mean_HD] = fit.mean_WHD
    return torch.einsum("chd,hd->c", o_CHD.double(), mean_HD / moments.weight_2W.sum())


def _left(sinks_WH: Tensor) -> Tensor:
    """What of the output a sink leaves at each node, [W, H, N]."""
    return torch.sigmoid(nodes() - sinks_WH[..., None])


def _mean_lost(moments: WindowMoments, sinks_WH: Tensor) -> Tensor:
    return moments.mean_HD - torch.einsum("whn,whnd->whd", _left(sinks_WH), moments.kept_WHND)


def _error(moments: WindowMoments, sinks_WH: Tensor, centred: bool) -> Tensor:
    """E(b) of near and far tokens, [2, W, H]; centred takes the energy of its mean out of the far ones' share."""
    left_WHN = _left(sinks_WH)
    error_2WH = moments.full_2WH - ((2 * moments.cross_2WHN - left_WHN * moments.square_2WHN) * left_WHN).sum(-1)
    error_2WH = error_2WH.clamp_min(0)
    if centred:
        mean_WHD = _mean_lost(moments, sinks_WH)
        energy_WH = torch.einsum("whd,hde,whe->wh", mean_WHD, moments.output_HDD, mean_WHD)
        energy_WH = energy_WH / moments.weight_2W.sum(0)[:, None]  # of the weighted mean, at every token's weight
        whole_WH = error_2WH.sum(0)
        error_2WH = error_2WH * ((whole_WH - energy_WH).clamp_min(0) / whole_WH.clamp_min(1e-300))
    return error_2WH
