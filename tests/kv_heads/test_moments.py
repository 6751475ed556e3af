"""Moments: their formulas, what is kept on disk, and Grams of too little rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.moments import (
    LayerMoments,
    MomentsSource,
    MomentSums,
    load,
    remove,
    require_own,
    save,
    saved,
)
from retrofit.kv_heads.merge.joint import apply_maps, calibrated_maps, group_cost
from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.model.spec import RopeSpec

T, H, K, D = 60, 4, 2, 6
ROPE = RopeSpec("default", 1e4, rotary_dim=4)


def sums_of(tokens: int = T, seed: int = 0) -> tuple[MomentSums, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, heads, D, generator=generator) + 0.3 for heads in (H, K, K))
    stream = torch.randn(tokens, 16, generator=generator) * torch.rand(tokens, 1, generator=generator) * 9
    sums = MomentSums(K)
    for part in (slice(0, 7), slice(7, tokens)):
        sums.add(q[part], k[part], v[part], stream[part])
    return sums, (q, k, v, stream)


def weights() -> LayerWeights:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(heads, D, 16, generator=generator) for heads in (H, K, K))
    return LayerWeights(q, k, v, torch.randn(16, H, D, generator=generator))


def test_means_and_norms_match_their_formula_in_any_chunking() -> None:
    sums, (_, k, v, stream) = sums_of()
    moments = sums.finish(0)
    assert torch.allclose(moments.key_mean_KD, k.double().mean(0), atol=1e-6)
    assert torch.allclose(moments.value_mean_KD, v.double().mean(0), atol=1e-6)
    energy = stream.double().square().mean(1)
    assert moments.stream_energy == pytest.approx(float(energy.mean()), rel=1e-6)
    middle, *_, largest = moments.stream_quantiles
    assert largest == pytest.approx(float(energy.max()), rel=1e-6)
    assert int((energy < middle * (1 - 1e-6)).sum()) == T // 2
    assert moments.averaged_KDKD is None
    assert moments.merged_values_KDKD is moments.value_KDKD


def test_averaged_values_are_summed_over_tokens_and_query_heads() -> None:
    sums, _ = sums_of()
    averaged = torch.randn(30, H, K, D)
    sums.add_averaged(averaged[:11])
    sums.add_averaged(averaged[11:])
    moments = sums.finish(0)
    plain = sum(torch.einsum("kd,le->kdle", u, u) for u in averaged.double().flatten(0, 1)) / (30 * H)
    assert moments.averaged_KDKD is not None
    assert moments.averaged_tokens == 30
    assert torch.allclose(moments.averaged_KDKD, plain, atol=1e-5)
    assert moments.merged_values_KDKD is moments.averaged_KDKD


def test_too_few_averaged_rows_are_filled_up_with_the_plain_gram_at_their_energy() -> None:
    sums, _ = sums_of()
    sums.add_averaged(torch.ones(1, H, K, D) * 0.1)  # rank one
    moments = sums.finish(0)
    assert moments.averaged_KDKD is not None
    gram = moments.averaged_KDKD.reshape(K * D, K * D)
    assert torch.linalg.matrix_rank(gram) == K * D
    assert float(gram.trace()) == pytest.approx(0.01 * K * D, rel=1e-5)


def test_averaged_values_that_are_not_finite_are_a_user_error() -> None:
    sums, _ = sums_of()
    sums.add_averaged(torch.full((3, H, K, D), torch.inf))
    with pytest.raises(UserError, match="averaged values of the calibration pass are not finite"):
        sums.finish(3)


@pytest.mark.parametrize("averaged", [True, False])
def test_saved_moments_give_the_same_costs(averaged: bool, tmp_path: Path) -> None:
    sums, _ = sums_of()
    if averaged:
        sums.add_averaged(torch.randn(50, H, K, D))
    moments = sums.finish(0)
    assert saved(tmp_path / "none") == ()
    for index in (11, 7):
        assert save(tmp_path, index, moments).name == f"layer-{index:03d}.safetensors"
    (tmp_path / ".layer-003.safetensors.partial").write_bytes(b"torn")
    assert saved(tmp_path) == (7, 11)
    again = load(tmp_path, 7)
    assert (again.tokens, again.averaged_tokens) == (moments.tokens, moments.averaged_tokens)
    assert (again.stream_energy, again.stream_quantiles) == (moments.stream_energy, moments.stream_quantiles)
    for name, tensor in vars(moments).items():
        if isinstance(tensor, torch.Tensor):
            other = getattr(again, name)
            assert other.dtype == tensor.dtype
            assert torch.allclose(other, tensor, rtol=1e-6, atol=1e-6), name
    costs = [group_cost(m, weights(), ROPE)((0, 1)) for m in (moments, again)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-6)
    assert costs[0] > 0.01


def test_moments_that_are_missing_or_torn_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no moments of layer 4"):
        load(tmp_path, 4)
    path = save(tmp_path, 4, sums_of()[0].finish(0))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="moments of layer 4 cannot be read"):
        load(tmp_path, 4)


def repeated(tokens: int) -> LayerMoments:
    """Grams of rank one, from one token only (and averaged values of none at all)."""
    sums, (q, k, v, _) = sums_of(8)
    sums = MomentSums(K)
    sums.add(*(tensor[:1].expand(tokens, -1, -1) for tensor in (q, k, v)))
    return sums.finish(0)


def test_a_gram_of_rank_one_merges_without_loss_and_with_finite_weights() -> None:
    moments = repeated(40)
    assert torch.linalg.matrix_rank(moments.value_KDKD.reshape(K * D, K * D), rtol=1e-6) == 1
    groups = ((0, 1),)
    maps, cost = calibrated_maps(moments, weights(), groups, ROPE)
    merged = apply_maps(weights(), maps, groups)
    for tensor in (merged.q_HDC, merged.k_KDC, merged.v_KDC, merged.o_CHD):
        assert tensor.isfinite().all()
    assert cost.values == pytest.approx(0, abs=1e-6)
    assert cost.keys == pytest.approx(0, abs=0.2)
    # One value vector for each head: the code of rank D holds them exactly.
    v = torch.randn(K, D, generator=torch.Generator().manual_seed(1)).double()
    only = replace(moments, value_KDKD=torch.einsum("kd,le->kdle", v, v))
    maps, cost = calibrated_maps(only, weights(), groups, ROPE)
    shared = torch.einsum("kde,ke->d", maps.value_encode, v)
    assert torch.allclose(maps.output_map @ shared, v, atol=1e-3 * float(v.abs().max()))


def test_moments_of_nothing_but_zeros_still_merge() -> None:
    sums = MomentSums(K)
    sums.add(torch.zeros(5, H, D), torch.zeros(5, K, D), torch.zeros(5, K, D))
    maps, _ = calibrated_maps(sums.finish(0), weights(), ((0, 1),), ROPE)
    assert all(tensor.isfinite().all() for tensor in vars(maps).values())


@pytest.mark.parametrize("name", ["layer-000.safetensors", "thesis.txt", "probes.json", "layer-000.safetensors.bak"])
def test_a_folder_is_one_of_moments_by_its_mark_and_with_nothing_else_in_it(name: str, tmp_path: Path) -> None:
    require_own(tmp_path / "none")
    require_own(tmp_path)
    (tmp_path / name).write_text("years of work", "utf-8")
    with pytest.raises(UserError, match="something else than moments"):
        require_own(tmp_path)
    MomentsSource({}, "original").write(tmp_path)
    if name in ("layer-000.safetensors", "probes.json"):
        require_own(tmp_path)
        remove(tmp_path)
        assert not tmp_path.exists()
    else:
        with pytest.raises(UserError, match="something else than moments"):
            require_own(tmp_path)
        remove(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
