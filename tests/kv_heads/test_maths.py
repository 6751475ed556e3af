"""The optimum of each part of a merge against a plain search, and the exact cases: nothing lost where nothing must
be."""

from __future__ import annotations

import pytest
import torch

from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.moments import MomentSums
from retrofit.kv_heads.merge.joint import pair_moments, rest_gram, rotary_indices
from retrofit.kv_heads.merge.optimum import complex_pca, joint_pca
from retrofit.kv_heads.repair.refit import LAMBDAS, RidgeSums, _Solution, refit
from retrofit.model.spec import RopeSpec


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def score_error(gram: torch.Tensor, energy: torch.Tensor, encode: torch.Tensor, decode: torch.Tensor) -> float:
    """sum_h E|q_h|^2 E|k_h - decode_h sum encode k|^2 for one pair, from the Gram, written out."""
    residual = torch.eye(len(energy), dtype=torch.complex128) - torch.outer(decode, encode)
    return float(((residual @ gram @ residual.mH).diagonal().real * energy).sum())


def test_complex_pca_reaches_its_cost_and_no_other_rank_one_key_is_better() -> None:
    k_SN = torch.randn(3, 200, dtype=torch.complex128) * torch.tensor([1.0, 2.0, 0.5])[:, None]
    gram = (k_SN @ k_SN.mH / 200)[None]
    energy = torch.tensor([[1.0], [0.3], [4.0]], dtype=torch.float64)
    encode, decode, lost = complex_pca(gram, energy)
    assert score_error(gram[0], energy[:, 0], encode[:, 0], decode[:, 0]) == pytest.approx(float(lost[0]), rel=1e-9)
    for _ in range(300):
        a = encode[:, 0] + 0.1 * torch.randn(3, dtype=torch.complex128)
        c = decode[:, 0] + 0.1 * torch.randn(3, dtype=torch.complex128)
        assert score_error(gram[0], energy[:, 0], a, c) >= float(lost[0]) * (1 - 1e-9)


def test_complex_pca_loses_nothing_where_heads_are_turned_copies() -> None:
    k = torch.randn(100, dtype=torch.complex128)
    turned = torch.stack([k, (0.3 - 2j) * k, 1j * k])
    encode, decode, lost = complex_pca((turned @ turned.mH / 100)[None], torch.ones(3, 1, dtype=torch.float64))
    assert float(lost[0]) < 1e-12
    shared = encode[:, 0] @ turned
    assert torch.allclose(decode[:, :1] * shared, turned, atol=1e-10)
    rms = turned.abs().square().mean().sqrt()
    assert float(shared.abs().square().mean().sqrt() / rms) == pytest.approx(1.0, rel=1e-6), "the RMS is kept"


def test_joint_pca_reaches_its_cost_and_beats_other_codes() -> None:
    d, blocks = 4, 3
    z = torch.randn(500, blocks * d, dtype=torch.float64) @ torch.randn(blocks * d, blocks * d, dtype=torch.float64)
    gram = z.T @ z / 500
    roots = torch.randn(blocks, d, d, dtype=torch.float64)
    metric = roots.mT @ roots

    def error(encode: torch.Tensor, decode: torch.Tensor) -> float:
        shared = torch.einsum("sde,nse->nd", encode, z.unflatten(1, (blocks, d)))
        difference = z.unflatten(1, (blocks, d)) - torch.einsum("sed,nd->nse", decode, shared)
        return float(torch.einsum("nsd,sde,nse->n", difference, metric, difference).mean())

    encode, decode, lost, whole = joint_pca(gram, metric)
    assert error(encode, decode) == pytest.approx(lost, rel=1e-4)
    assert error(torch.zeros_like(encode), decode) == pytest.approx(whole, rel=1e-4)
    for _ in range(100):
        other = error(encode + 0.05 * torch.randn_like(encode), decode + 0.05 * torch.randn_like(decode))
        assert other >= lost * (1 - 1e-6)


def test_pairs_follow_the_pairing() -> None:
    half = rotary_indices(RopeSpec("default", 1e4, rotary_dim=4), 6)
    interleaved = rotary_indices(RopeSpec("default", 1e4, rotary_dim=4, pairing="interleaved"), 6)
    assert [t.tolist() for t in half] == [[0, 1], [2, 3], [4, 5]]
    assert [t.tolist() for t in interleaved] == [[0, 2], [1, 3], [4, 5]]
    assert [t.tolist() for t in rotary_indices(None, 3)] == [[], [], [0, 1, 2]]


def test_moments_match_their_formula_in_any_chunking() -> None:
    t, h, k, d = 60, 4, 2, 6
    q, key, v = torch.randn(t, h, d), torch.randn(t, k, d), torch.randn(t, k, d)
    x, y, rest = rotary_indices(RopeSpec("default", 1e4, rotary_dim=4), d)
    sums = MomentSums(k)
    for part in (slice(0, 7), slice(7, 60)):
        sums.add(q[part], key[part], v[part])
    moments = sums.finish(0)
    kappa = torch.complex(key[..., :2], key[..., 2:4])
    expected = torch.einsum("tkp,tlp->pkl", kappa, kappa.conj()) / t
    key_PKK, energy_KP = pair_moments(moments, (0, 1), x, y)
    assert torch.allclose(key_PKK, expected.to(torch.complex128), atol=1e-5)
    energy = torch.stack([(q[:, 2 * i : 2 * i + 2, :4].unflatten(-1, (2, 2)) ** 2).sum((1, 2)).mean(0) for i in (0, 1)])
    assert torch.allclose(energy_KP, energy.double(), atol=1e-5)
    unrotated = key[..., 4:].flatten(1).double()
    assert torch.allclose(rest_gram(moments, (0, 1), rest), unrotated.T.cov(correction=0), atol=1e-5)
    assert torch.allclose(moments.value_KDKD, torch.einsum("tku,tlw->kulw", v, v).double() / t, atol=1e-5)
    assert moments.tokens == t


@pytest.mark.parametrize("rope", [None, RopeSpec("default", 10_000.0, 2)])
@pytest.mark.parametrize("broken", ["queries", "keys", "values"])
def test_moments_that_are_not_finite_are_a_user_error_naming_the_layer(rope: RopeSpec | None, broken: str) -> None:
    sums = MomentSums(1)
    sums.add(*(torch.full((3, 1, 2), torch.nan if name == broken else 1.0) for name in ("queries", "keys", "values")))
    with pytest.raises(UserError, match=f"{broken} of the calibration pass are not finite") as caught:
        sums.finish(7)
    assert caught.value.where == "layer 7"


def ridge_data(w_CN: torch.Tensor, tokens: int, noise: float) -> RidgeSums:
    z = torch.randn(tokens, w_CN.shape[1])
    y = z @ w_CN.T.float() + noise * torch.randn(tokens, w_CN.shape[0])
    return RidgeSums.of(z, y, torch.rand(tokens) + 0.5)


def test_ridge_sums_give_the_weighted_error_of_a_plain_loop() -> None:
    w = torch.randn(3, 5, dtype=torch.float64)
    z, y, weight = torch.randn(40, 5), torch.randn(40, 3), torch.rand(40)
    plain = sum(float(weight[t]) * float(((w.float() @ z[t] - y[t]) ** 2).sum()) for t in range(40)) / float(
        weight.sum()
    )
    halves = RidgeSums.of(z[:11], y[:11], weight[:11]) + RidgeSums.of(z[11:], y[11:], weight[11:])
    for sums in (RidgeSums.of(z, y, weight), halves):
        error = sums.squared_error(w, sums.residual(w)) / sums.weight
        assert error == pytest.approx(plain, rel=1e-4)


def test_a_refit_finds_the_projection_that_every_kind_shares() -> None:
    truth = torch.randn(3, 6, dtype=torch.float64)
    sums = {(kind, part): ridge_data(truth, 400, 0.05) for kind in "ab" for part in (0, 1)}
    result = refit(sums, torch.zeros(3, 6, dtype=torch.float64))
    assert result.accepted
    assert result.held_out_after < 0.02 < 0.9 < result.held_out_before
    assert torch.allclose(result.w_CN, truth, atol=0.05)


def test_a_refit_that_only_helps_its_own_kind_is_kept_out() -> None:
    start = torch.randn(3, 6, dtype=torch.float64)
    sums = {}
    for kind in "ab":  # each kind has a projection of its own: fitting one makes the other worse
        own = start + 5 * torch.randn(3, 6, dtype=torch.float64)
        sums |= {(kind, part): ridge_data(own, 400, 0.0) for part in (0, 1)}
    sums |= {("c", part): ridge_data(start, 400, 0.0) for part in (0, 1)}  # here the start is already exact
    result = refit(sums, start)
    assert not result.accepted
    assert result.w_CN is start
    assert result.held_out_after == result.held_out_before


def test_every_strength_is_judged_by_the_step_that_it_takes() -> None:
    start, truth = torch.randn(2, 3, 6, dtype=torch.float64)
    fitted, unseen = (ridge_data(truth, 40, 0.3) for _ in range(2))
    trial = _Solution.of(fitted, start)
    at_start, ratio_L = trial.on_unseen(unseen, start)

    def lost(w_CN: torch.Tensor) -> float:
        return unseen.squared_error(w_CN, unseen.residual(w_CN))

    assert at_start == pytest.approx(lost(start) / unseen.energy)
    want = [lost(start + trial.step(strength)) / lost(start) for strength in LAMBDAS]
    assert ratio_L.tolist() == pytest.approx(want, rel=1e-4)


def test_a_refit_agrees_with_the_normal_equations() -> None:
    start, truth = torch.randn(2, 3, 6, dtype=torch.float64)
    sums = {(kind, part): ridge_data(truth, 300, 0.3) for kind in "ab" for part in (0, 1)}
    result = refit(sums, start)
    total = sum(list(sums.values())[1:], next(iter(sums.values())))
    assert result.strength is not None
    ridge = result.strength * float(torch.linalg.eigvalsh(total.gram_NN).mean()) * torch.eye(6, dtype=torch.float64)
    want = start + (total.cross_CN - start @ total.gram_NN) @ torch.linalg.inv(total.gram_NN + ridge)
    assert torch.allclose(result.w_CN, want, atol=1e-4)
