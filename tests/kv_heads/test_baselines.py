"""Merges for comparison: exact where their own symmetry holds, their cost as the formula says, never below the
optimum's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrofit.kv_heads.convert import convert
from retrofit.kv_heads.merge.baselines import METHODS, plain_vectors, procrustes_pairs, procrustes_vectors, real_pairs
from retrofit.kv_heads.merge.optimum import complex_pca, joint_pca
from tests.kv_heads.test_convert import logits, run, text, with_twin_heads
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


EXACT = {"procrustes": "orthogonal", "real-pca": "real"}


@pytest.mark.parametrize("family", ["llama", "phi", "smollm3", "cohere", "gemma2"])
@pytest.mark.parametrize("method", list(EXACT))
def test_twins_of_a_method_s_own_symmetry_merge_without_loss(family: str, method: str, tmp_path: Path) -> None:
    source = with_twin_heads(family, tmp_path / "source", EXACT[method])
    ids = torch.randint(0, 256, (1, 40))
    want = logits(source, ids)
    out = run(source, tmp_path / "out", kv_heads=2, method=method, repair="none", text=text(16))
    assert torch.allclose(logits(out, ids), want, atol=1e-5 * float(want.abs().max()))


def test_real_pca_loses_what_calibrated_keeps_where_pairs_are_turned(tmp_path: Path) -> None:
    source = with_twin_heads("llama", tmp_path / "source", "orthogonal")
    reports = {}
    for method in METHODS:
        (tmp_path / method).mkdir()
        reports[method] = convert(source, tmp_path / method, kv_heads=2, method=method, repair="none", text=text())  # type: ignore[arg-type]
    keys = {method: report.layers[0].keys for method, report in reports.items()}
    assert keys["calibrated"] < 1e-5
    assert keys["procrustes"] < 1e-5 < 0.05 < keys["real-pca"]  # type: ignore[operator]


@pytest.mark.parametrize("repair", ["none", "o_proj"])
@pytest.mark.parametrize("method", list(EXACT))
def test_methods_convert_with_and_without_repair(method: str, repair: str, tmp_path: Path) -> None:
    source, out = save_tiny(tmp_path / "source", "qwen2"), tmp_path / "out"
    out.mkdir()
    report = convert(source, out, kv_heads=1, method=method, repair=repair, text=text())  # type: ignore[arg-type]
    assert report.method == method
    assert report.tokens == 8 * 48
    assert all(0 < (layer.keys or 0) < 1 and 0 < (layer.values or 0) < 1 for layer in report.layers)
    assert logits(out, torch.zeros(1, 5, dtype=torch.long)).isfinite().all()


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of three heads and two pairs, [P, S, T], their Gram and query energies."""
    k_PST = torch.randn(2, 3, 300, dtype=torch.complex128) * torch.tensor([1.0, 2.0, 0.5])[:, None]
    k_PST = k_PST + 2 * torch.randn(2, 1, 300, dtype=torch.complex128) * torch.tensor([1, 1j, -0.7 - 0.7j])[:, None]
    return k_PST, k_PST @ k_PST.mH / 300, torch.rand(3, 2, dtype=torch.float64) + 0.2


@pytest.mark.parametrize("merge", [procrustes_pairs, real_pairs])
def test_pairs_cost_what_their_maps_lose_and_no_less_than_the_optimum(merge) -> None:  # type: ignore[no-untyped-def]
    k_PST, gram, energy = pairs()
    encode, decode, lost = merge(gram, energy)
    shared_PT = torch.einsum("sp,pst->pt", encode, k_PST)
    error = (k_PST - decode.T[..., None] * shared_PT[:, None]).abs().square().mean(-1)
    assert torch.allclose((error * energy.T).sum(1), lost, rtol=1e-9)
    assert (lost >= complex_pca(gram, energy)[2]).all()
    kind = (decode.abs() - 1) if merge is procrustes_pairs else decode.imag
    assert float(kind.abs().max()) < 1e-9


def test_procrustes_phases_are_the_best_phases() -> None:
    k_PST, gram, energy = pairs()
    encode, _, _ = procrustes_pairs(gram, energy)

    def distance(phase_SP: torch.Tensor) -> torch.Tensor:
        turned = phase_SP.T[..., None] * k_PST
        return (turned - turned.mean(1, keepdim=True)).abs().square().mean((1, 2))

    best = distance(encode * 3)
    for _ in range(200):
        assert (distance(encode * 3 * torch.polar(torch.ones(3, 2), 0.1 * torch.randn(3, 2))) >= best - 1e-9).all()


@pytest.mark.parametrize("merge", [procrustes_vectors, plain_vectors])
def test_vectors_cost_what_their_maps_lose_and_no_less_than_the_optimum(merge) -> None:  # type: ignore[no-untyped-def]
    d, s = 4, 3
    z = torch.randn(500, s * d, dtype=torch.float64) @ torch.randn(s * d, s * d, dtype=torch.float64)
    roots = torch.randn(s, d, d, dtype=torch.float64)
    metric, gram = roots.mT @ roots, z.T @ z / 500
    encode, decode, lost, whole = merge(gram, metric)
    z_TSD = z.unflatten(1, (s, d))
    difference = z_TSD - torch.einsum("sde,te->tsd", decode, torch.einsum("sde,tse->td", encode, z_TSD))
    assert float(torch.einsum("tsd,sde,tse->t", difference, metric, difference).mean()) == pytest.approx(lost, rel=1e-6)
    assert float(torch.einsum("tsd,sde,tse->t", z_TSD, metric, z_TSD).mean()) == pytest.approx(whole, rel=1e-6)
    assert lost >= joint_pca(gram, metric)[2] * (1 - 1e-9)
    if merge is procrustes_vectors:
        assert torch.allclose(decode @ decode.mT, torch.eye(d, dtype=torch.float64).expand(s, d, d), atol=1e-9)
