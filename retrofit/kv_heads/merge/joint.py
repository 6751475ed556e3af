"""Merging a group of KV heads into one: the linear maps, and the exact optimum of each part's cost.

A merge of a layer is four stacks of D x D maps, one per old KV head h in group g:

    shared key    k_g = sum_h key_encode_h k_h          query   q' = query_map_h q     (q reads head h)
    shared value  v_g = sum_h value_encode_h v_h        output  W_o' = W_o output_map_h

`first` and `mean` are special cases; `calibrated` is the optimum under the moments: weighted complex PCA per rotary
pair, from there the best map across pairs (`folding`), weighted real PCA for unrotated dims and jointly for values and
output projection.

Constant parts. Attention weights sum to 1, so a constant in the values leaves attention as a constant: where the
output projection has a bias, values are merged about their mean and the bias takes what that loses. Unrotated key dims
are always merged about their mean: a constant there adds the same to all of a query's scores, which softmax ignores.
In rotated pairs, and in values without an output bias, it is a direction like any other. A bias of the k or v
projection then gains nothing: the best shared code c b of the constants mu_h has captured |c^H mu|^2 of them, which is
what the largest eigenvector of the uncentred Gram counts already. Biases go through the same maps, exactly.

Legend: H query heads, K KV heads, G groups, D head dim, P rotary pairs, U unrotated dims, C model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrofit.kv_heads.calibrate.moments import LayerMoments
from retrofit.kv_heads.merge.folding import RotationAverage, fold_keys
from retrofit.kv_heads.merge.optimum import complex_pca, joint_pca, query_weight, weighted
from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.model.spec import RopeSpec

Groups = tuple[tuple[int, ...], ...]

_LOSSLESS = 1e-4  # share of the scores' energy below which pairs keep to themselves: their merge is exact, a fit is not


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one layer, each [K, D, D], float64.

    lost_mean_KD: the part of the values' mean that is left to the output projection's bias, zero where it has none.
    """

    key_encode: Tensor
    query_map: Tensor
    value_encode: Tensor
    output_map: Tensor
    lost_mean_KD: Tensor

    def reorder(self, order: tuple[int, ...]) -> HeadMaps:
        """The same maps with KV heads in `order`."""
        index = torch.tensor(order)
        return HeadMaps(
            self.key_encode[index],
            self.query_map[index],
            self.value_encode[index],
            self.output_map[index],
            self.lost_mean_KD[index],
        )


@dataclass(frozen=True)
class MergeCost:
    """Share of the energy of the scores (keys; None where they are mean-pooled) and of the attention output (values)
    that a merge gives up: 0 to 1."""

    keys: float | None
    values: float


@dataclass(frozen=True)
class MergeMethod:
    """How the parts of a group are merged.

    pairs: a shared key per rotary pair, as `complex_pca`. unrotated, values: a shared code of unrotated key dims and of
    values, as `joint_pca`. averaged: values as attention averages them, where the moments know that.
    """

    pairs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    unrotated: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, float, float]]
    values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, float, float]]
    averaged: bool = True


CALIBRATED = MergeMethod(complex_pca, joint_pca, joint_pca)


def contiguous_groups(kv_heads: int, groups: int) -> Groups:
    """Old KV heads in order, `kv_heads // groups` to a group."""
    size = kv_heads // groups
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))


def mean_maps(kv_heads: int, groups: int, head_dim: int) -> HeadMaps:
    """Mean pooling (GQA, arXiv 2305.13245, section 2.1)."""
    eye = torch.eye(head_dim, dtype=torch.float64).expand(kv_heads, -1, -1)
    pooled = eye * (groups / kv_heads)
    return HeadMaps(pooled, eye, pooled, eye, eye.new_zeros(kv_heads, head_dim))


def rotary_indices(rope: RopeSpec | None, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dims (x_P, y_P, rest_U): pair i is the complex number x_i + j y_i; the rest is not rotated."""
    rotary = 0 if rope is None else rope.rotary_dim
    dims = torch.arange(rotary)
    if rope is not None and rope.pairing == "interleaved":
        return dims[0::2], dims[1::2], torch.arange(rotary, head_dim)
    return dims[: rotary // 2], dims[rotary // 2 :], torch.arange(rotary, head_dim)


def output_metric(weights: LayerWeights) -> Tensor:
    """[K, D, D]: sum over the query heads that read KV head k of W_o^T W_o."""
    o_CHD = weights.o_CHD.double()
    per_head = torch.einsum("chd,che->hde", o_CHD, o_CHD)
    return per_head.unflatten(0, (weights.kv_heads, -1)).sum(1)


def merge_keys(
    moments: LayerMoments,
    heads: tuple[int, ...],
    rope: RopeSpec | None,
    head_dim: int,
    method: MergeMethod = CALIBRATED,
    turning: RotationAverage | None = None,
) -> tuple[Tensor, Tensor, float, float]:
    """Shared key of one group: key_encode, query_map [s, D, D], the lost and the whole energy of the scores.

    turning: the rotations, where rotary pairs may share their places.
    """
    x, y, rest = rotary_indices(rope, head_dim)
    index = torch.tensor(heads)
    encode = torch.zeros(len(heads), head_dim, head_dim, dtype=torch.float64)
    query = torch.zeros_like(encode)
    lost = whole = 0.0
    if len(x):
        gram, energy = pair_moments(moments, heads, x, y)
        a, c, lost_P = method.pairs(gram, energy)
        for matrix, z in ((encode, a), (query, c.conj())):
            matrix[:, x, x] = matrix[:, y, y] = z.real
            matrix[:, x, y], matrix[:, y, x] = -z.imag, z.imag
        lost += float(lost_P.sum())
        whole += float((gram.diagonal(dim1=1, dim2=2).real * energy.T).sum())
        if turning is not None and lost > _LOSSLESS * whole:
            both = torch.cat((x, y))
            rotary = both[:, None], both
            gram_SRSR = moments.key_KDKD[index][:, :, index][:, both][..., both]
            query_SRR = moments.query_KDD[index][:, *rotary]
            start_SRR = encode[:, *rotary]
            encode[:, *rotary], query[:, *rotary], lost, whole = fold_keys(gram_SRSR, query_SRR, start_SRR, turning)
            lost, whole = 2 * lost, 2 * whole  # the energy of a complex number is twice that of its real part
    if len(rest):
        gram = rest_gram(moments, heads, rest)
        e, d, lost_rest, whole_rest = method.unrotated(gram, moments.query_KDD[index][:, rest[:, None], rest])
        encode[:, rest[:, None], rest] = e
        query[:, rest[:, None], rest] = d.mT
        # The rotated part sums |q|^2 |k|^2 over pairs, whose real part has half that energy on average.
        lost, whole = lost + 2 * lost_rest, whole + 2 * whole_rest
    return encode, query, lost, whole


def pair_moments(moments: LayerMoments, heads: tuple[int, ...], x_P: Tensor, y_P: Tensor) -> tuple[Tensor, Tensor]:
    """Of some heads' rotary pairs as complex numbers: E[k_p k_p^H], [P, s, s], and E|q_p|^2, [s, P]."""
    index = torch.tensor(heads)
    gram = moments.key_KDKD[index][:, :, index]

    def of(a_P: Tensor, b_P: Tensor) -> Tensor:
        return gram[:, a_P, :, b_P]

    energy_KD = moments.query_KDD[index].diagonal(dim1=1, dim2=2)
    return torch.complex(of(x_P, x_P) + of(y_P, y_P), of(y_P, x_P) - of(x_P, y_P)), energy_KD[:, x_P] + energy_KD[
        :, y_P
    ]


def rest_gram(moments: LayerMoments, heads: tuple[int, ...], rest_U: Tensor) -> Tensor:
    """Covariance of the unrotated dims of some heads' keys, [s U, s U]."""
    index = torch.tensor(heads)
    mean = moments.key_mean_KD[index][:, rest_U].flatten()
    gram = moments.key_KDKD[index][:, :, index][:, rest_U][..., rest_U]
    return gram.flatten(2, 3).flatten(0, 1) - torch.outer(mean, mean)


def merge_values(
    moments: LayerMoments,
    heads: tuple[int, ...],
    metric_KDD: Tensor,
    *,
    centred: bool = False,
    method: MergeMethod = CALIBRATED,
) -> tuple[Tensor, Tensor, float, float]:
    """Shared value of one group: value_encode, output_map [s, D, D], the lost and the whole energy of the output.

    centred: the output projection has a bias, which holds the mean.
    """
    gram, _ = value_gram(moments, heads, centred=centred, averaged=method.averaged)
    return method.values(gram, metric_KDD[torch.tensor(heads)])


def value_gram(
    moments: LayerMoments, heads: tuple[int, ...], *, centred: bool, averaged: bool = True
) -> tuple[Tensor, Tensor]:
    """Gram [s D, s D] of some heads' values, or their covariance, and their mean [s, D]."""
    index = torch.tensor(heads)
    gram_KDKD, mean_KD = moments.value_KDKD, moments.value_mean_KD
    if averaged:
        gram_KDKD, mean_KD = moments.merged_values_KDKD, moments.merged_mean_KD
    gram, mean = gram_KDKD[index][:, :, index].flatten(2, 3).flatten(0, 1), mean_KD[index]
    return (gram - torch.outer(mean.flatten(), mean.flatten()) if centred else gram), mean


def calibrated_maps(
    moments: LayerMoments,
    weights: LayerWeights,
    groups: Groups,
    rope: RopeSpec | None,
    *,
    method: MergeMethod = CALIBRATED,
    keys: bool = True,
    turning: RotationAverage | None = None,
) -> tuple[HeadMaps, MergeCost]:
    """Maps of all groups: by default the optimum for keys and for values and output projection.

    `keys=False` keeps mean pooling for the keys. turning: as in `merge_keys`.
    """
    kv_heads, head_dim, _ = weights.k_KDC.shape
    maps = mean_maps(kv_heads, len(groups), head_dim)
    stacks = [m.clone() for m in (maps.key_encode, maps.query_map, maps.value_encode, maps.output_map)]
    lost_mean_KD = maps.lost_mean_KD
    metric, centred = output_metric(weights), weights.o_bias_C is not None
    lost_k = whole_k = lost_v = whole_v = 0.0
    for heads in groups:
        index = list(heads)
        if keys:
            key, query, lost, whole = merge_keys(moments, heads, rope, head_dim, method, turning)
            stacks[0][index], stacks[1][index] = key, query
            lost_k, whole_k = lost_k + lost, whole_k + whole
        encode, output, lost, whole = merge_values(moments, heads, metric, centred=centred, method=method)
        stacks[2][index], stacks[3][index] = encode, output
        lost_v, whole_v = lost_v + lost, whole_v + whole
        if centred:
            _, mean_SD = value_gram(moments, heads, centred=True, averaged=method.averaged)
            lost_mean_KD[index] = mean_SD - output @ torch.einsum("sde,se->d", encode, mean_SD)
    cost = MergeCost(lost_k / whole_k if whole_k else None, lost_v / whole_v if whole_v else 0.0)
    key, query, value, output_map = stacks
    return HeadMaps(key, query, value, output_map, lost_mean_KD), cost


def group_cost(
    moments: LayerMoments, weights: LayerWeights, rope: RopeSpec | None, *, keys: bool = True
) -> Callable[[tuple[int, ...]], float]:
    """Predicted cost of one group, as a share of the layer's energy: keys and values add up.

    The same numbers as `merge_keys` (per rotary pair; folding only lowers them) and `merge_values` give, in fp32 and
    from eigenvalues alone, because a search for groups asks for hundreds.
    """
    kv_heads, head_dim, _ = weights.k_KDC.shape
    everyone = tuple(range(kv_heads))
    x, y, rest = rotary_indices(rope, head_dim)
    gram, _ = value_gram(moments, everyone, centred=weights.o_bias_C is not None)
    values = weighted(gram, output_metric(weights))
    pairs_PKK = torch.zeros(0, kv_heads, kv_heads)
    unrotated = torch.zeros(0, 0)
    if keys and len(x):
        key_PKK, energy_KP = pair_moments(moments, everyone, x, y)
        weight_PK = query_weight(energy_KP)
        pairs_PKK = (weight_PK[:, :, None] * key_PKK * weight_PK[:, None, :]).to(torch.complex64)
    if keys and len(rest):
        query_KUU = moments.query_KDD[:, rest[:, None], rest]
        unrotated = 2 * weighted(rest_gram(moments, everyone, rest), query_KUU).float()
    whole_k = float(pairs_PKK.diagonal(dim1=1, dim2=2).real.sum() + unrotated.trace())
    values = (values / values.trace().clamp_min(1e-300)).float()

    def lost(gram_NN: Tensor, index: Tensor) -> float:
        d = len(gram_NN) // kv_heads
        n = (index[:, None] * d + torch.arange(d)).flatten()
        return float(torch.linalg.eigvalsh(gram_NN[n[:, None], n])[: len(n) - d].clamp_min(0).sum())

    def cost(heads: tuple[int, ...]) -> float:
        index = torch.tensor(heads)
        tails = torch.linalg.eigvalsh(pairs_PKK[:, index[:, None], index])[:, :-1]
        lost_k = float(tails.clamp_min(0).sum()) + lost(unrotated, index)
        return lost(values, index) + lost_k / max(whole_k, 1e-30)

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
    q_bias, k_norm, o_bias = weights.q_bias_HD, weights.k_norm_KD, weights.o_bias_C
    if o_bias is not None:
        lost_HD = maps.lost_mean_KD.repeat_interleave(per_query, 0)
        o_bias = (o_bias.double() + torch.einsum("chd,hd->c", weights.o_CHD.double(), lost_HD)).float()
    return replace(
        weights,
        q_HDC=torch.einsum("hde,hec->hdc", query_HDD, weights.q_HDC.double()).float(),
        k_KDC=key,
        v_KDC=value,
        o_CHD=torch.einsum("chd,hde->che", weights.o_CHD.double(), output_HDD).float(),
        q_bias_HD=None if q_bias is None else torch.einsum("hde,he->hd", query_HDD, q_bias.double()).float(),
        k_bias_KD=shared(maps.key_encode, weights.k_bias_KD),
        v_bias_KD=shared(maps.value_encode, weights.v_bias_KD),
        o_bias_C=o_bias,
        k_norm_KD=None if k_norm is None else k_norm.unflatten(0, (g, -1)).mean(1),
    )
