"""Keys and queries of a merged layer that normalises them (Qwen3, Gemma 3, OLMo 2, ...).

After a norm no magnitude can be absorbed, so the maps of `merge.py` cannot be written into the weights. What the maps
make of the post-norm vectors is instead what new projections are fitted to, for keys group by group and for queries
head by head. With z the raw vectors of a unit's old heads, stacked, N the norm without its weight, g' its new weight,

    target  t = sum_h encode_h g N(z_h)         fit  g' N(B z) ~ t

B is found by iteratively reweighted ridge: with r the size that the norm divides B z by, from the round before, B z / r
is linear in B. A norm leaves a direction only, so B z / r aims at t / g' at the norm's own size, weighed by the size of
t / g'. The norm's weight is then refitted by diagonal least squares. All of it is sums over tokens: a Gram per unit and
round, for which the text is read once a round.

What counts is the error of the scores on text the fit did not see, E|conj(q') k' - conj(q) k|^2 over rotary pairs and
query heads (q and k of different tokens, the phase between them left out), as a share of E|conj(q) k|^2. Where it is
not below that of mean pooling, keys are mean-pooled and queries stay.

Legend: T tokens, H query heads, K KV heads, G groups, D head dim, U units (groups for keys, query heads for queries), F
features of a unit (its old heads' raw dims, and a one where the projection has a bias), P rotary pairs, R unrotated
dims, C model width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from retrofit.kv_heads.merge.joint import Groups, HeadMaps, apply_maps, mean_maps, rotary_indices
from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.model.spec import LayerAttention
from retrofit.system.world import ALONE, World

Inputs = Callable[[], Iterable[tuple[bool, Tensor]]]
"""Each call goes through the text: (held out, what the projections read [T, C]) of every chunk."""

_ROUNDS = 3
_RIDGE = 1e-5  # times the mean of a Gram's diagonal, towards the round before


@dataclass(frozen=True)
class Norm:
    """The norm of a layer's queries or keys, without its weight.

    full: over all heads together. centred: a layer norm, which subtracts the mean first.
    """

    full: bool
    centred: bool
    eps: float

    @classmethod
    def of(cls, layer: LayerAttention) -> Norm:
        return cls(layer.qk_norm == "full", layer.qk_norm_kind == "layer", layer.qk_norm_eps)

    def size(self, y_TUD: Tensor) -> Tensor:
        """What the norm divides by, [T, U, 1] or [T, 1, 1]."""
        square = self.centre(y_TUD).square()
        return (square.mean((1, 2), keepdim=True) if self.full else square.mean(2, keepdim=True)).add(self.eps).sqrt()

    def centre(self, y_TUD: Tensor) -> Tensor:
        return y_TUD - y_TUD.mean(-1, keepdim=True) if self.centred else y_TUD

    def __call__(self, y_TUD: Tensor) -> Tensor:
        return self.centre(y_TUD) / self.size(y_TUD)


def project(a_TC: Tensor, w_HDC: Tensor, bias_HD: Tensor | None) -> Tensor:
    """Raw queries, keys or values, [T, H, D]."""
    out = (a_TC @ w_HDC.flatten(0, 1).T.to(a_TC.device)).unflatten(1, w_HDC.shape[:2])
    return out if bias_HD is None else out + bias_HD.to(a_TC.device)


def queries_and_keys(a_TC: Tensor, weights: LayerWeights, layer: LayerAttention) -> tuple[Tensor, Tensor]:
    """Queries [T, H, D] and keys [T, K, D] as RoPE gets them: after their norm where the layer has one."""
    q = project(a_TC, weights.q_HDC, weights.q_bias_HD)
    k = project(a_TC, weights.k_KDC, weights.k_bias_KD)
    if not can_fit(layer):
        return q, k
    norm, (q_norm, k_norm) = Norm.of(layer), _norm_weights(weights, layer)
    return norm(q) * q_norm.to(q.device), norm(k) * k_norm.to(k.device)


def can_fit(layer: LayerAttention) -> bool:
    """Whether the layer has a norm that keys can be fitted through (one with a bias is not handled)."""
    return layer.qk_norm is not None and not layer.qk_norm_bias


def _norm_weights(weights: LayerWeights, layer: LayerAttention) -> tuple[Tensor, Tensor]:
    """What the norms multiply queries [H, D] and keys [K, D] with."""
    assert weights.q_norm_HD is not None and weights.k_norm_KD is not None
    return weights.q_norm_HD + layer.qk_norm_offset, weights.k_norm_KD + layer.qk_norm_offset


@dataclass(frozen=True)
class KeyFit:
    """A merged layer: its values and output projection by the maps, its keys and queries fitted or pooled.

    fitted, pooled: held-out error of the scores with each, as a share of their energy. accepted: whether the fitted
    ones were kept.
    """

    weights: LayerWeights
    accepted: bool
    fitted: float
    pooled: float

    @property
    def lost(self) -> float:
        """Error of what was kept."""
        return self.fitted if self.accepted else self.pooled


def fit_keys(
    weights: LayerWeights,
    maps: HeadMaps,
    groups: Groups,
    layer: LayerAttention,
    inputs: Inputs,
    world: World = ALONE,
) -> KeyFit:
    """Merge a layer with a norm on queries and keys; maps: the optimum under the moments of post-norm vectors.

    Some of the text must be held out, and some not. world: the processes that make this call, each with text of its
    own; sums are over all of it, and rank 0 solves for all.
    """
    none_TC = weights.k_KDC.new_empty(0, weights.k_KDC.shape[2])  # of a process without text
    order = tuple(head for group in groups for head in group)
    pooling = mean_maps(len(order), len(groups), layer.head_dim)
    merged = apply_maps(weights, replace(maps, key_encode=pooling.key_encode, query_map=pooling.query_map), groups)
    weights, maps = weights.reorder(order), maps.reorder(order)
    shared = layer.qk_norm == "head" and layer.qk_norm_weights == "shared"
    q_norm, k_norm = _norm_weights(weights, layer)
    per_query = weights.q_HDC.shape[0] // len(order)
    keys = _Side.start(maps.key_encode, k_norm, len(groups), Norm.of(layer), shared, weights.k_bias_KD)
    query_map = maps.query_map.repeat_interleave(per_query, 0)
    queries = _Side.start(query_map, q_norm, len(q_norm), Norm.of(layer), shared, weights.q_bias_HD)
    for step in [_Side.solved] * _ROUNDS + [_Side.weighed]:
        of_queries = _Sums.of(queries, project(none_TC, weights.q_HDC, weights.q_bias_HD))
        of_keys = _Sums.of(keys, project(none_TC, weights.k_KDC, weights.k_bias_KD))
        for held_out, a_TC in inputs():
            if not held_out:
                of_queries += _Sums.of(queries, project(a_TC, weights.q_HDC, weights.q_bias_HD))
                of_keys += _Sums.of(keys, project(a_TC, weights.k_KDC, weights.k_bias_KD))
        of_queries, of_keys = of_queries.together(world), of_keys.together(world)
        assert of_keys.tokens, "all of the text is held out"
        if world.main:
            queries, keys = step(queries, of_queries), step(keys, of_keys)
        queries, keys = world.share((queries, keys))
    q, q_bias, q_norm = queries.weights(weights.q_HDC, weights.q_bias_HD, layer)
    k, k_bias, k_norm = keys.weights(weights.k_KDC, weights.k_bias_KD, layer)
    fitted = replace(merged, q_HDC=q, q_bias_HD=q_bias, q_norm_HD=q_norm, k_KDC=k, k_bias_KD=k_bias, k_norm_KD=k_norm)
    errors = [ScoreError(layer), ScoreError(layer)]
    for held_out, a_TC in itertools.chain([(True, none_TC)], inputs()):
        if held_out:
            original = queries_and_keys(a_TC, weights, layer)
            for error, candidate in zip(errors, (fitted, merged), strict=True):
                error.add(original, queries_and_keys(a_TC, candidate, layer))
    for error in errors:
        error.together(world)
    shares = [error.share() for error in errors]
    accepted = shares[0] < shares[1]
    return world.share(KeyFit(fitted if accepted else merged, accepted, *shares))


@dataclass(frozen=True)
class _Side:
    """Queries or keys as they stand in the fit.

    encode_UFD: what makes the target of a unit's old post-norm vectors, [U, S D, D]. b_UFD: what makes the new raw
    vector of the features. old_HD, g_UD: the norm's weight before and now. shared: all units have one weight.
    """

    encode_UFD: Tensor
    b_UFD: Tensor
    old_HD: Tensor
    g_UD: Tensor
    norm: Norm
    shared: bool
    bias: bool

    @classmethod
    def start(
        cls, encode_HDD: Tensor, old_HD: Tensor, units: int, norm: Norm, shared: bool, bias: Tensor | None
    ) -> _Side:
        """The maps, as if all heads' raw vectors had one size."""
        g_UD = old_HD.unflatten(0, (units, -1)).mean(1)
        encode_UFD = encode_HDD.float().mT.unflatten(0, (units, -1)).flatten(1, 2)
        safe_UD = torch.where(g_UD.abs() > 1e-4, g_UD, 1e-4)
        b_UFD = encode_UFD * old_HD.unflatten(0, (units, -1)).flatten(1)[..., None] / safe_UD[:, None, :]
        if bias is not None:
            b_UFD = torch.cat([b_UFD, torch.zeros_like(b_UFD[:, :1])], 1)
        return cls(encode_UFD, b_UFD, old_HD, safe_UD, norm, shared, bias is not None)

    def on(self, device: torch.device) -> _Side:
        """The same on another device."""
        return replace(
            self,
            encode_UFD=self.encode_UFD.to(device),
            b_UFD=self.b_UFD.to(device),
            old_HD=self.old_HD.to(device),
            g_UD=self.g_UD.to(device),
        )

    def features(self, raw_THD: Tensor) -> Tensor:
        """[U, T, F]"""
        z_TUF = raw_THD.unflatten(1, (len(self.g_UD), -1)).flatten(2)
        if self.bias:
            z_TUF = torch.cat([z_TUF, torch.ones_like(z_TUF[..., :1])], -1)
        return z_TUF.transpose(0, 1)

    def target(self, raw_THD: Tensor) -> Tensor:
        """[T, U, D]"""
        post_TUF = (self.norm(raw_THD) * self.old_HD).unflatten(1, (len(self.g_UD), -1)).flatten(2)
        return (post_TUF.transpose(0, 1) @ self.encode_UFD).transpose(0, 1)

    def solved(self, sums: _Sums) -> _Side:
        """With the ridge's solution in place of B."""
        gram_UFF, cross_UFD = sums.gram_UFF, sums.cross_UFD
        ridge = _RIDGE * gram_UFF.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
        gram_UFF = gram_UFF + ridge * torch.eye(gram_UFF.shape[1], dtype=gram_UFF.dtype)
        b_UFD = torch.linalg.solve(gram_UFF, cross_UFD + ridge * self.b_UFD.double())
        return replace(self, b_UFD=b_UFD.float())

    def weighed(self, sums: _Sums) -> _Side:
        """With the least-squares weight of the norm."""
        nt_UD, nn_UD = sums.nt_UD, sums.nn_UD
        if self.shared:
            nt_UD, nn_UD = (x.sum(0, keepdim=True).expand_as(x) for x in (nt_UD, nn_UD))
        return replace(self, g_UD=(nt_UD / nn_UD.clamp_min(1e-30)).float())

    def weights(
        self, old_HDC: Tensor, bias_HD: Tensor | None, layer: LayerAttention
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Projection [U, D, C], its bias [U, D] and the stored norm weight [U, D]."""
        units, n = len(self.g_UD), self.encode_UFD.shape[1]
        b_UDF = self.b_UFD[:, :n].double().mT
        new_UDC = (b_UDF @ old_HDC.double().unflatten(0, (units, -1)).flatten(1, 2)).float()
        if bias_HD is not None:
            old_bias = bias_HD.double().unflatten(0, (units, -1)).flatten(1)[..., None]
            bias_HD = ((b_UDF @ old_bias)[..., 0] + self.b_UFD[:, n].double()).float()
        return new_UDC, bias_HD, self.g_UD - layer.qk_norm_offset


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens of one round, float64: of the reweighted ridge, and of the norm weight's regression."""

    gram_UFF: Tensor
    cross_UFD: Tensor
    nn_UD: Tensor
    nt_UD: Tensor
    tokens: int

    @classmethod
    def of(cls, side: _Side, raw_THD: Tensor) -> _Sums:
        """Of a chunk of tokens, on the CPU wherever the model runs."""
        side = side.on(raw_THD.device)
        z_UTF, target_TUD = side.features(raw_THD), side.target(raw_THD)
        y_TUD = (z_UTF @ side.b_UFD).transpose(0, 1)
        r, n_TUD = side.norm.size(y_TUD), side.norm(y_TUD)
        aim_TUD = side.norm.centre(target_TUD / side.g_UD)
        weight = side.norm.size(aim_TUD)
        weighted_UFT = (z_UTF * (weight / r.square()).transpose(0, 1)).mT
        parts = (
            weighted_UFT @ z_UTF,
            weighted_UFT @ (aim_TUD * (r / weight)).transpose(0, 1),
            n_TUD.square().sum(0),
            (n_TUD * target_TUD).sum(0),
        )
        gram_UFF, cross_UFD, nn_UD, nt_UD = (part.cpu().double() for part in parts)
        return cls(gram_UFF, cross_UFD, nn_UD, nt_UD, len(raw_THD))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def together(self, world: World) -> _Sums:
        """Those of all processes."""
        for part in (self.gram_UFF, self.cross_UFD, self.nn_UD, self.nt_UD):
            world.sum_(part)
        return replace(self, tokens=sum(world.gather(self.tokens)))


class ScoreError:
    """Mean squared error of the scores, from sums over tokens: the tokens of queries and of keys are different ones.

    Unrotated dims count about their mean (softmax ignores the rest), twice, as a rotary pair's |q|^2 |k|^2 is twice the
    energy of its real part.
    """

    def __init__(self, layer: LayerAttention) -> None:
        self._indices = rotary_indices(layer.rope, layer.head_dim)
        self._heads, self._tokens = layer.query_heads, 0
        self._sums: list[Tensor] | None = None

    def add(self, original: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
        """Add a chunk: queries [T, H, D] and keys [T, K or G, D] of both, query heads in the same order."""
        x, y, rest = self._indices
        q, k, q2, k2 = (self._per_query(tensor.float()) for pair in (original, other) for tensor in pair)

        def paired(z_THD: Tensor) -> Tensor:
            return torch.complex(z_THD[..., x], z_THD[..., y])

        parts: list[Tensor] = []
        for left, right in ((q, q), (k, k), (q2, q2), (k2, k2), (q2, q), (k2, k)):
            parts.append((paired(left) * paired(right).conj()).sum(0))
            parts.append(left[..., rest].permute(1, 2, 0) @ right[..., rest].transpose(0, 1))
        parts += [k[..., rest].sum(0), k2[..., rest].sum(0)]
        doubled = [part.to("cpu", torch.complex128 if part.is_complex() else torch.float64) for part in parts]
        self._sums = doubled if self._sums is None else [a.add_(b) for a, b in zip(self._sums, doubled, strict=True)]
        self._tokens += q.shape[0]

    def _per_query(self, z_TKD: Tensor) -> Tensor:
        return z_TKD.repeat_interleave(self._heads // z_TKD.shape[1], 1)

    def together(self, world: World) -> None:
        """Take in what the other processes have added; all of them call this, after at least an empty chunk."""
        assert self._sums is not None
        self._tokens = sum(world.gather(self._tokens))
        for part in self._sums:
            world.sum_(torch.view_as_real(part) if part.is_complex() else part)

    def share(self) -> float:
        """The error over the energy of the original scores."""
        assert self._sums is not None and self._tokens, "no text was held out"
        qq, qq_r, kk, kk_r, q2, q2_r, k2, k2_r, qx, qx_r, kx, kx_r, mean, mean2 = (s / self._tokens for s in self._sums)
        kk_r = kk_r - mean[..., None] * mean[:, None]
        k2_r = k2_r - mean2[..., None] * mean2[:, None]
        kx_r = kx_r - mean2[..., None] * mean[:, None]
        whole = float((qq * kk).real.sum()) + 2 * float((qq_r * kk_r).sum())
        after = float((q2 * k2).real.sum()) + 2 * float((q2_r * k2_r).sum())
        both = float((qx.conj() * kx).real.sum()) + 2 * float((qx_r * kx_r).sum())
        return (whole + after - 2 * both) / max(whole, 1e-300)
