"""The exact optimum of one group: the best shared key of a rotary pair, the best shared code of unrotated vectors.

Legend: N = S D stacked dims of S heads, K heads, D head dim, P rotary pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-6  # of the mean eigenvalue: keeps square roots and inverses of rank-deficient Grams finite


def query_weight(energy_KP: Tensor) -> Tensor:
    """sqrt of E|q|^2 per rotary pair and head, [P, K], floored."""
    return energy_KP.T.clamp_min(_FLOOR * energy_KP.mean().clamp_min(1e-30)).sqrt()


def complex_pca(gram_PKK: Tensor, energy_KP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-1 shared key per rotary pair under the queries' weights.

    gram: E[kappa kappa^H], complex. energy: E|q|^2 over the query heads that read each KV head.
    Returns encode_KP, decode_KP (complex: k_h ~ decode_h * sum_h' encode_h' k_h') and lost_P = tr C - lambda_1.
    The shared key keeps the weighted RMS of the originals, so low precision is as safe as before.
    """
    weight_PK = query_weight(energy_KP)
    c_PKK = weight_PK[:, :, None] * gram_PKK * weight_PK[:, None, :]
    values, vectors = torch.linalg.eigh(c_PKK)
    v_PK = vectors[..., -1]
    # A unit eigenvector is free up to a phase: make the largest component real, so results are reproducible.
    largest = v_PK.gather(1, v_PK.abs().argmax(1, keepdim=True))
    v_PK = v_PK * (largest.conj() / largest.abs())
    encode_PK, decode_PK = v_PK.conj() * weight_PK, v_PK / weight_PK
    power = gram_PKK.diagonal(dim1=1, dim2=2).real
    rms_P = ((power * weight_PK**2).sum(1) / (weight_PK**2).sum(1)).clamp_min(1e-30).sqrt()
    scale_P = (rms_P / values[:, -1].clamp_min(1e-30).sqrt())[:, None]
    lost_P = values[:, :-1].clamp_min(0).sum(1)
    return (encode_PK * scale_P).T, (decode_PK / scale_P).T, lost_P


def root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a batch of Grams, and its inverse, with eigenvalues floored."""
    values, vectors = torch.linalg.eigh(gram)
    floor = _FLOOR * values.mean(-1, keepdim=True).clamp_min(1e-30)
    half = values.clamp_min(floor).sqrt()
    return (vectors * half[..., None, :]) @ vectors.mT, (vectors / half[..., None, :]) @ vectors.mT


def joint_pca(gram_NN: Tensor, metric_SDD: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Best rank-D code of S stacked D-vectors under block metrics.

    gram: E[z z^T] of the stacked vectors, N = S D. metric: what an error of block s costs, M_s^T M_s.
    Returns encode [S, D, D], decode [S, D, D], the lost and the whole weighted energy (tail and sum of eigenvalues).
    """
    blocks, d, _ = metric_SDD.shape
    half, inverse = root(metric_SDD)
    p, p_inverse = torch.block_diag(*half), torch.block_diag(*inverse)
    values, vectors = torch.linalg.eigh(p @ gram_NN @ p)
    top = vectors[:, -d:].flip(1)
    top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    # Spread the code's energy evenly over its dims, at the originals' RMS: safe in low precision.
    rms = (gram_NN.diagonal().mean().clamp_min(1e-30) / values[-d:].mean().clamp_min(1e-30)).sqrt()
    encode = (top.T @ p * rms).reshape(d, blocks, d).transpose(0, 1)
    decode = (p_inverse @ top / rms).reshape(blocks, d, d)
    return encode, decode, float(values[:-d].clamp_min(0).sum()), float(values.clamp_min(0).sum())


def weighted(gram_NN: Tensor, metric_KDD: Tensor) -> Tensor:
    """P gram P, P the block-diagonal square root of the metric: its tail eigenvalues are what a code loses."""
    half, n = root(metric_KDD)[0], len(gram_NN)
    left = half @ gram_NN.reshape(*half.shape[:2], n)
    return (half @ left.reshape(n, n).T.reshape(*half.shape[:2], n)).reshape(n, n)
