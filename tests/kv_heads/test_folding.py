"""The shared key across rotary pairs: its averages, its cost, and what it wins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from retrofit.kv_heads.calibrate.moments import LayerMoments, MomentSums
from retrofit.kv_heads.merge.folding import RotationAverage, fold_keys
from retrofit.kv_heads.merge.joint import merge_keys
from retrofit.model.spec import RopeSpec

S, P, WINDOW = 3, 4, 50
R = 2 * P
FREQUENCIES = np.array([1.0, 0.3, 0.01, 0.009])
ROPE = RopeSpec("default", 1e4, R)


def rotation(distance: float, frequencies: np.ndarray = FREQUENCIES) -> Tensor:
    angle = torch.from_numpy(frequencies) * distance
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))


def shares(window: int = WINDOW) -> Tensor:
    share = 1 / (1 + torch.arange(window, dtype=torch.float64))
    return share / share.sum()


def gram(seed: int, n: int) -> Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / n


def expected_error(gram_NN: Tensor, query_SRR: Tensor, encode: Tensor, query_map: Tensor) -> float:
    """sum_d p(d) sum_h E (q^T R_d k_h - (F_h q)^T R_d E k)^2, term by term."""
    total = 0.0
    for distance, share in enumerate(shares()):
        turn = rotation(distance)
        for h in range(S):
            picked = torch.eye(S * R, dtype=torch.float64)[h * R : (h + 1) * R]
            error = turn @ picked - query_map[h].T @ turn @ torch.cat(list(encode), 1)
            total += float(share * (query_SRR[h] * (error @ gram_NN @ error.T)).sum())
    return total


@pytest.mark.parametrize("back", [False, True])
def test_means_over_distances_are_those_of_the_rotations_themselves(
    back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofit.kv_heads.merge.folding._DISTANCES", 7)
    x = torch.randn(2, R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turns = [rotation(d).T if back else rotation(d) for d in range(WINDOW)]
    expected = sum(share * (turn @ x @ turn.T) for share, turn in zip(shares(), turns, strict=True))
    assert torch.allclose(RotationAverage.over(FREQUENCIES, WINDOW).mean(x, back=back), expected, atol=1e-12)


def test_the_lost_energy_is_the_expected_error_of_the_scores() -> None:
    keys, queries = gram(1, S * R), torch.stack([gram(2 + h, R) for h in range(S)])
    start = torch.eye(R, dtype=torch.float64).expand(S, R, R) / S
    encode, query_map, lost, whole = fold_keys(
        keys.reshape(S, R, S, R), queries, start, RotationAverage.over(FREQUENCIES, WINDOW)
    )
    assert lost == pytest.approx(expected_error(keys, queries, encode, query_map), rel=1e-6)
    nothing = torch.zeros(S, R, R, dtype=torch.float64)
    assert whole == pytest.approx(expected_error(keys, queries, nothing, nothing), rel=1e-9)
    # No small change of either map does better: it ends near a minimum, in the queries' maps exactly.
    for seed in range(4):
        step = 1e-3 * torch.randn(S, R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert expected_error(keys, queries, encode, query_map + step) > lost


def moments_of(keys_TSR: Tensor, queries_TSR: Tensor) -> LayerMoments:
    sums = MomentSums(S)
    sums.add(queries_TSR, keys_TSR, torch.randn(len(keys_TSR), S, R))
    return sums.finish(0)


def test_pairs_of_like_frequency_lend_each_other_their_room() -> None:
    """Two heads that use the same slow pair for different things fit, where a neighbour of it is nearly idle."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = (0.02 * torch.randn(400, S, R, generator=generator) for _ in range(2))
    for t in (keys, queries):
        t[:, :2, 2::P] = torch.randn(400, 2, 2, generator=generator)  # pair 2 of two heads, unlike each other
    moments = moments_of(keys, queries)
    turning = RotationAverage.over(FREQUENCIES, WINDOW)
    *_, alone, whole_alone = merge_keys(moments, (0, 1, 2), ROPE, R)
    encode, query_map, lost, whole = merge_keys(moments, (0, 1, 2), ROPE, R, turning=turning)
    assert alone / whole_alone > 0.3
    assert lost / whole < 0.1 * alone / whole_alone
    assert torch.isfinite(encode).all()
    assert torch.isfinite(query_map).all()


@pytest.mark.parametrize("seed", range(3))
def test_folding_never_loses_more_than_one_direction_of_each_pair(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(S * R, S * R, generator=generator)
    keys = (torch.randn(300, S * R, generator=generator) @ mix).reshape(300, S, R)
    queries = torch.randn(300, S, R, generator=generator) * torch.rand(S, R, generator=generator)
    moments = moments_of(keys, queries)
    query_SRR = moments.query_KDD
    encode, query_map, *_ = merge_keys(moments, (0, 1, 2), ROPE, R)
    before = expected_error(moments.key_KDKD.reshape(S * R, S * R), query_SRR, encode, query_map)
    *_, lost, _ = merge_keys(moments, (0, 1, 2), ROPE, R, turning=RotationAverage.over(FREQUENCIES, WINDOW))
    assert lost / 2 < 0.95 * before
