"""Merges of the literature, for comparison with the optimum of `merge.py`; they need the same moments and nothing else.

`procrustes`: every head of a group is turned to lie on the group's mean by the orthogonal map that its place allows (a
phase per rotary pair, an orthogonal matrix for unrotated key dims and for values), the mean being that of the turned
heads; then they are averaged. Queries and output projection take the inverse, so heads that differ by such maps merge
without loss.

`real-pca`: principal components that ignore what RoPE allows and what a value is used for: one real scale per head and
rotary pair, weighted by query energy, and an unweighted PCA of the values.

Neither knows what attention averages. Groups are those of `calibrated`, so that a comparison shows the merge alone.

Legend: S heads of a group, D dims of a vector, N = S D, P rotary pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kv_heads.merge.joint import CALIBRATED, MergeMethod
from retrofit.kv_heads.merge.optimum import joint_pca, query_weight

_ROUNDS = 30  # of turning all heads to their mean; each lowers their distance to it


def procrustes_pairs(gram_PSS: Tensor, energy_SP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit phases. As `complex_pca`: encode_SP, decode_SP, lost_P."""
    phase_PS = _unit(gram_PSS[:, 0])  # E[k_0 conj(k_h)] turns head h to the first
    for _ in range(_ROUNDS):
        phase_PS = _unit(torch.einsum("pg,pgh->ph", phase_PS, gram_PSS))
    encode_PS, decode_PS = phase_PS / phase_PS.shape[1], phase_PS.conj()
    return encode_PS.T, decode_PS.T, _pairs_lost(gram_PSS, energy_SP, encode_PS, decode_PS)


def real_pairs(gram_PSS: Tensor, energy_SP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real scales: the first real principal component. As `complex_pca`."""
    weight_PS = query_weight(energy_SP)
    values, vectors = torch.linalg.eigh(weight_PS[:, :, None] * gram_PSS.real * weight_PS[:, None, :])
    v_PS = vectors[..., -1]
    v_PS = v_PS * v_PS.gather(1, v_PS.abs().argmax(1, keepdim=True)).sign()
    rms_P = (
        (values.clamp_min(0).sum(1) / (weight_PS**2).sum(1)).clamp_min(1e-30).sqrt()
    )  # the shared key's, as in `complex_pca`
    scale_P1 = (rms_P / values[:, -1].clamp_min(1e-30).sqrt())[:, None]
    encode_PS, decode_PS = (z.to(gram_PSS.dtype) for z in (v_PS * weight_PS * scale_P1, v_PS / weight_PS / scale_P1))
    return encode_PS.T, decode_PS.T, _pairs_lost(gram_PSS, energy_SP, encode_PS, decode_PS)


def procrustes_vectors(gram_NN: Tensor, metric_SDD: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Orthogonal matrices. As `joint_pca`: encode, decode, the lost and the whole weighted energy."""
    s, d, _ = metric_SDD.shape
    gram_SDSD = gram_NN.reshape(s, d, s, d)
    turn_SDD = _orthogonal(gram_SDSD[0].permute(1, 0, 2))
    for _ in range(_ROUNDS):
        turn_SDD = _orthogonal(torch.einsum("gab,gbhc->hac", turn_SDD, gram_SDSD))
    encode, decode = turn_SDD / s, turn_SDD.mT
    return encode, decode, *_vectors_lost(gram_NN, metric_SDD, encode, decode)


def plain_vectors(gram_NN: Tensor, metric_SDD: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Principal components that ignore the metric. As `joint_pca`; what is lost is weighed as there."""
    encode, decode, _, _ = joint_pca(gram_NN, torch.eye(metric_SDD.shape[1]).to(metric_SDD).expand_as(metric_SDD))
    return encode, decode, *_vectors_lost(gram_NN, metric_SDD, encode, decode)


def _unit(z: Tensor) -> Tensor:
    """z / |z|, and 1 for 0."""
    size = z.abs()
    return torch.where(size > 0, z / size.clamp_min(1e-300), torch.ones_like(z))


def _orthogonal(cross_SDD: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each matrix."""
    u, _, vt = torch.linalg.svd(cross_SDD)
    return u @ vt


def _pairs_lost(gram_PSS: Tensor, energy_SP: Tensor, encode_PS: Tensor, decode_PS: Tensor) -> Tensor:
    """sum_h E|q_h|^2 E|k_h - decode_h sum encode k|^2 per pair."""
    residual = torch.eye(gram_PSS.shape[1]).to(gram_PSS) - decode_PS[:, :, None] * encode_PS[:, None, :]
    return ((residual @ gram_PSS @ residual.mH).diagonal(dim1=1, dim2=2).real * energy_SP.T).sum(1)


def _vectors_lost(gram_NN: Tensor, metric_SDD: Tensor, encode: Tensor, decode: Tensor) -> tuple[float, float]:
    """Weighted energy of z_h - decode_h sum encode z, and of z."""
    s, d, _ = metric_SDD.shape
    residual = torch.eye(s * d).to(gram_NN) - decode.reshape(s * d, d) @ encode.transpose(0, 1).reshape(d, s * d)

    def energy(gram: Tensor) -> float:
        return float(torch.einsum("sdse,sde->", gram.reshape(s, d, s, d), metric_SDD))

    return energy(residual @ gram_NN @ residual.T), energy(gram_NN)


METHODS: dict[str, MergeMethod] = {
    "calibrated": CALIBRATED,
    "procrustes": MergeMethod(procrustes_pairs, procrustes_vectors, procrustes_vectors, averaged=False),
    "real-pca": MergeMethod(real_pairs, joint_pca, plain_vectors, averaged=False),
}
"""How heads are merged, by the methods that calibrate."""
