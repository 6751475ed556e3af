"""Merging a group of KV heads into one: the linear maps, and the exact optimum of each part's cost.

A merge of a layer is four stacks of D x D maps, one per old KV head h in group g:

    shared key    k_g = sum_h key_encode_h k_h          query   q' = query_map_h q     (q reads head h)
    shared value  v_g = sum_h value_encode_h v_h        output  W_o' = W_o output_map_h

`first` and `mean` are special cases; `calibrated` is the optimum under the moments (DESIGN of this project: weighted
complex PCA per rotary pair, weighted real PCA for unrotated dims and jointly for values and output projection).

Legend: H query heads, K KV heads, G groups, D head dim, P rotary pairs, U unrotated dims, C model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrofit.kv_heads.moments import LayerMoments
from retrofit.kv_heads.weights import LayerWeights
from retrofit.model.spec import RopeSpec

Groups = tuple[tuple[int, ...], ...]
_FLOOR = 1e-6  # of the mean eigenvalue: keeps square roots and inverses of rank-deficient Grams finite


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one layer, each [K, D, D], float64."""

    key_encode: Tensor
    query_map: Tensor
    value_encode: Tensor
    output_map: Tensor

    def reorder(self, order: tuple[int, ...]) -> HeadMaps:
        """The same maps with KV heads in `order`."""
        index = torch.tensor(order)
        return HeadMaps(self.key_encode[index], self.query_map[index], self.value_encode[index], self.output_map[index])


@dataclass(frozen=True)
class MergeCost:
    """Share of the energy of the scores (keys; None where they are mean-pooled) and of the attention output (values)
    that a merge gives up: 0 to 1."""

    keys: float | None
    values: float


def contiguous_groups(kv_heads: int, groups: int) -> Groups:
    """Old KV heads in order, `kv_heads // groups` to a group."""
    size = kv_heads // groups
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))


def mean_maps(kv_heads: int, groups: int, head_dim: int) -> HeadMaps:
    """Mean pooling (GQA, arXiv 2305.13245, section 2.1)."""
    eye = torch.eye(head_dim, dtype=torch.float64).expand(kv_heads, -1, -1)
    pooled = eye * (groups / kv_heads)
    return HeadMaps(pooled, eye, pooled, eye)


def first_maps(kv_heads: int, groups: int, head_dim: int) -> HeadMaps:
    """The first KV head of each group stands for the group."""
    eye = torch.eye(head_dim, dtype=torch.float64).expand(kv_heads, -1, -1)
    keep = (torch.arange(kv_heads) % (kv_heads // groups) == 0).double()[:, None, None]
    return HeadMaps(eye * keep, eye, eye * keep, eye)


def rotary_indices(rope: RopeSpec | None, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dims (x_P, y_P, rest_U): pair i is the complex number x_i + j y_i; the rest is not rotated."""
    rotary = 0 if rope is None else rope.rotary_dim
    dims = torch.arange(rotary)
    if rope is not None and rope.pairing == "interleaved":
        return dims[0::2], dims[1::2], torch.arange(rotary, head_dim)
    return dims[: rotary // 2], dims[rotary // 2 :], torch.arange(rotary, head_dim)


def complex_pca(gram_PKK: Tensor, energy_KP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-1 shared key per rotary pair under the queries' weights.

    gram: E[kappa kappa^H], complex. energy: E|q|^2 over the query heads that read each KV head.
    Returns encode_KP, decode_KP (complex: k_h ~ decode_h * sum_h' encode_h' k_h') and lost_P = tr C - lambda_1.
    The shared key keeps the weighted RMS of the originals, so low precision is as safe as before.
    """
    weight_PK = energy_KP.T.clamp_min(_FLOOR * energy_KP.mean().clamp_min(1e-30)).sqrt()
    c_PKK = weight_PK[:, :, None] * gram_PKK * weight_PK[:, None, :]
    values, vectors = torch.linalg.eigh(c_PKK)
    v_PK = vectors[..., -1]
    # A unit eigenvector is free up to a phase: make the largest component real, so results are reproducible.
    largest = v_PK.gather(1, v_PK.abs().argmax(1, keepdim=True))
    v_PK = v_PK * (largest.conj() / largest.abs())
    encode_PK, decode_PK = v_PK.conj() * weight_PK, v_PK / weight_PK
    power = gram_PKK.diagonal(dim1=1, dim2=2).real
    rms_P = ((power * weight_PK**2).sum(1) / (weight_PK**2).sum(1)).sqrt()
    scale_P = (rms_P / values[:, -1].clamp_min(1e-30).sqrt())[:, None]
    lost_P = values[:, :-1].clamp_min(0).sum(1)
    return (encode_PK * scale_P).T, (decode_PK / scale_P).T, lost_P


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a batch of Grams, and its inverse, with eigenvalues floored."""
    values, vectors = torch.linalg.eigh(gram)
    floor = _FLOOR * values.mean(-1, keepdim=True).clamp_min(1e-30)
    root = values.clamp_min(floor).sqrt()
    scaled = vectors * root[..., None, :]
    return scaled @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT


def joint_pca(gram_NN: Tensor, metric_SDD: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Best rank-D code of S stacked D-vectors under block metrics.

    gram: E[z z^T] of the stacked vectors, N = S D. metric: what an error of block s costs, M_s^T M_s.
    Returns encode [S, D, D], decode [S, D, D], the lost and the whole weighted energy (tail and sum of eigenvalues).
    """
    blocks, d, _ = metric_SDD.shape
    root, inverse = _root(metric_SDD)
    p, p_inverse = torch.block_diag(*root), torch.block_diag(*inverse)
    values, vectors = torch.linalg.eigh(p @ gram_NN @ p)
    top = vectors[:, -d:].flip(1)
    top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    # Spread the code's energy evenly over its dims, at the originals' RMS: safe in low precision.
    rms = (gram_NN.diagonal().mean() / values[-d:].mean().clamp_min(1e-30)).sqrt()
    encode = (top.T @ p * rms).reshape(d, blocks, d).transpose(0, 1)
    decode = (p_inverse @ top / rms).reshape(blocks, d, d)
    return encode, decode, float(values[:-d].clamp_min(0).sum()), float(values.clamp_min(0).sum())


def output_metric(weights: LayerWeights) -> Tensor:
    """[K, D, D]: sum over the query heads that read KV head k of W_o^T W_o."""
    o_CHD = weights.o_CHD.double()
    per_head = torch.einsum("chd,che->hde", o_CHD, o_CHD)
    return per_head.unflatten(0, (weights.kv_heads, -1)).sum(1)


def merge_keys(
    moments: LayerMoments, heads: tuple[int, ...], rope: RopeSpec | None, head_dim: int
) -> tuple[Tensor, Tensor, float, float]:
    """Shared key of one group: key_encode, query_map [s, D, D], the lost and the whole energy of the scores."""
    x, y, rest = rotary_indices(rope, head_dim)
    index = torch.tensor(heads)
    encode = torch.zeros(len(heads), head_dim, head_dim, dtype=torch.float64)
    query = torch.zeros_like(encode)
    lost = whole = 0.0
    if len(x):
        gram = moments.key_PKK[:, index][:, :, index]
        energy = moments.query_energy_KP[index]
        a, c, lost_P = complex_pca(gram, energy)
        for matrix, z in ((encode, a), (query, c.conj())):
            matrix[:, x, x] = matrix[:, y, y] = z.real
            matrix[:, x, y], matrix[:, y, x] = -z.imag, z.imag
        lost += float(lost_P.sum())
        whole += float((gram.diagonal(dim1=1, dim2=2).real * energy.T).sum())
    if len(rest):
        gram = moments.key_rest[index][:, :, index].flatten(2, 3).flatten(0, 1)
        e, d, lost_rest, whole_rest = joint_pca(gram, moments.query_rest_KUU[index])
        encode[:, rest[:, None], rest] = e
        query[:, rest[:, None], rest] = d.mT
        # The rotated part sums |q|^2 |k|^2 over pairs, whose real part has half that energy on average.
        lost, whole = lost + 2 * lost_rest, whole + 2 * whole_rest
    return encode, query, lost, whole


def merge_values(
    moments: LayerMoments, heads: tuple[int, ...], metric_KDD: Tensor
) -> tuple[Tensor, Tensor, float, float]:
    """Shared value of one group: value_encode, output_map [s, D, D], the lost and the whole energy of the output."""
    index = torch.tensor(heads)
    gram = moments.value_KDKD[index][:, :, index].flatten(2, 3).flatten(0, 1)
    return joint_pca(gram, metric_KDD[index])


def calibrated_maps(
    moments: LayerMoments,
    weights: LayerWeights,
    groups: Groups,
    rope: RopeSpec | None,
    *,
    keys: bool = True,
) -> tuple[HeadMaps, MergeCost]:
    """The optimum for keys and for values and output projection. `keys=False` keeps mean pooling for the keys."""
    kv_heads, head_dim, _ = weights.k_KDC.shape
    maps = mean_maps(kv_heads, len(groups), head_dim)
    stacks = [m.clone() for m in (maps.key_encode, maps.query_map, maps.value_encode, maps.output_map)]
    metric = output_metric(weights)
    lost_k = whole_k = lost_v = whole_v = 0.0
    for heads in groups:
        index = list(heads)
        if keys:
            stacks[0][index], stacks[1][index], lost, whole = merge_keys(moments, heads, rope, head_dim)
            lost_k, whole_k = lost_k + lost, whole_k + whole
        stacks[2][index], stacks[3][index], lost, whole = merge_values(moments, heads, metric)
        lost_v, whole_v = lost_v + lost, whole_v + whole
    cost = MergeCost(lost_k / whole_k if whole_k else None, lost_v / whole_v)
    return HeadMaps(*stacks), cost


def group_cost(
    moments: LayerMoments, weights: LayerWeights, rope: RopeSpec | None, *, keys: bool = True
) -> Callable[[tuple[int, ...]], float]:
    """Predicted cost of one group, as a share of the layer's energy: keys and values add up."""
    metric, head_dim = output_metric(weights), weights.k_KDC.shape[1]
    singles = [(h,) for h in range(weights.kv_heads)]
    whole_v = sum(merge_values(moments, h, metric)[3] for h in singles)
    whole_k = sum(merge_keys(moments, h, rope, head_dim)[3] for h in singles) if keys else 1.0

    def cost(heads: tuple[int, ...]) -> float:
        lost = merge_values(moments, heads, metric)[2] / whole_v
        return lost + merge_keys(moments, heads, rope, head_dim)[2] / whole_k if keys else lost

    return cost


def apply_maps(weights: LayerWeights, maps: HeadMaps, groups: Groups) -> LayerWeights:
    """Weights of the merged layer; heads of a group are first made neighbours, with their query heads."""
    order = tuple(head for group in groups for head in group)
    weights, maps = weights.reorder(order), maps.reorder(order)
    g, per_query = len(groups), weights.q_HDC.shape[0] // weights.kv_heads

    def shared(encode: Tensor, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        mapped = torch.einsum("kde,ke...->kd...", encode, tensor.double())
        return mapped.unflatten(0, (g, -1)).sum(1).float()

    query_HDD = maps.query_map.repeat_interleave(per_query, 0)
    output_HDD = maps.output_map.repeat_interleave(per_query, 0)
    key, value = shared(maps.key_encode, weights.k_KDC), shared(maps.value_encode, weights.v_KDC)
    assert key is not None and value is not None
    q_bias, k_norm = weights.q_bias_HD, weights.k_norm_KD
    return replace(
        weights,
        q_HDC=torch.einsum("hde,hec->hdc", query_HDD, weights.q_HDC.double()).float(),
        k_KDC=key,
        v_KDC=value,
        o_CHD=torch.einsum("chd,hde->che", weights.o_CHD.double(), output_HDD).float(),
        q_bias_HD=None if q_bias is None else torch.einsum("hde,he->hd", query_HDD, q_bias.double()).float(),
        k_bias_KD=shared(maps.key_encode, weights.k_bias_KD),
        v_bias_KD=shared(maps.value_encode, weights.v_bias_KD),
        k_norm_KD=None if k_norm is None else k_norm.unflatten(0, (g, -1)).mean(1),
    )
