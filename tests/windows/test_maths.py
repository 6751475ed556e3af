"""Windows and sinks against softmax written out with a mask and one more column, and the closed forms against brute
force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retrofit.kernels.captured import AttentionInputs
from retrofit.kernels.sinks import with_sinks
from retrofit.windows.moments import FAR, NEAR, WindowMoments, WindowSums, nodes
from retrofit.windows.nested import nested_windows
from retrofit.windows.sinks import NONE, evaluate_sinks, fit_sinks

WINDOWS = (3, 8, 20)
TOKENS = 37


def dense(inputs: AttentionInputs, window: int | None, sinks_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], log-sum-exp [B, H, T]) of causal attention under a window, a sink as one more column."""
    groups = inputs.q_BHTD.shape[1] // inputs.k_BKSD.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (inputs.k_BKSD, inputs.v_BKSD))
    scores = inputs.q_BHTD @ k.mT * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    t = torch.arange(scores.shape[-1])
    distance = t[:, None] - t
    reach = min(window or len(t), inputs.window or len(t))
    scores = scores.masked_fill((distance < 0) | (distance >= reach), -math.inf)
    lse = scores.logsumexp(-1)
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., : len(t)] @ v, lse


def random_inputs(
    *, heads: int = 4, kv_heads: int = 2, window: int | None = None, softcap: float | None = None, tokens: int = TOKENS
) -> AttentionInputs:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, n, tokens, 8, generator=generator) for n in (heads, kv_heads, kv_heads))
    return AttentionInputs(q * 2, k, v, 0.5, window, softcap)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (14, None), (3, None), (None, 2.0)])
@pytest.mark.parametrize("rows", [5, 16, 64])
def test_nested_windows_are_those_of_a_mask(window: int | None, softcap: float | None, rows: int) -> None:
    inputs, seen = random_inputs(window=window, softcap=softcap), 0
    for at, out, lse in nested_windows(inputs, WINDOWS, rows):
        assert at.start == seen
        seen = at.stop
        for own, own_lse, size in zip(out, lse, (*WINDOWS, None), strict=True):
            expected, expected_lse = dense(inputs, size)
            torch.testing.assert_close(own, expected[:, :, at], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(own_lse, expected_lse[:, :, at], atol=2e-6, rtol=1e-5)
    assert seen == TOKENS


def test_scores_far_above_those_nearby_take_nothing_from_their_accuracy() -> None:
    inputs = random_inputs()
    inputs.k_BKSD[:, :, 0] *= 300  # as an attention sink of a few hundred nats
    for at, out, lse in nested_windows(inputs, WINDOWS, 16):
        for own, own_lse, size in zip(out, lse, (*WINDOWS, None), strict=True):
            expected, expected_lse = dense(inputs, size)
            torch.testing.assert_close(own, expected[:, :, at], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(own_lse, expected_lse[:, :, at], atol=1e-5, rtol=1e-5)


def test_a_sink_is_one_more_key_without_a_value() -> None:
    inputs, sinks_H = random_inputs(), torch.tensor([-1.0, 0.5, 3.0, NONE])
    [(_, out, lse)] = list(nested_windows(inputs, (8,), 64))
    torch.testing.assert_close(
        with_sinks(out[0], lse[0], sinks_H)[0], dense(inputs, 8, sinks_H)[0], atol=2e-6, rtol=1e-5
    )
    torch.testing.assert_close(with_sinks(out[0], lse[0], sinks_H)[0][:, 3], out[0][:, 3])


def summed(inputs: AttentionInputs, o_CHD: Tensor, weight_BT: Tensor) -> WindowMoments:
    sums = WindowSums(WINDOWS, o_CHD)
    for row in range(2):
        one = AttentionInputs(
            *(x[row : row + 1] for x in (inputs.q_BHTD, inputs.k_BKSD, inputs.v_BKSD)), inputs.scale, inputs.window
        )
        sums.add(one, weight_BT[row : row + 1])
    return sums.finish(0)


def errors(
    inputs: AttentionInputs, o_CHD: Tensor, weight_BT: Tensor, sinks_H: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(energy of near tokens' error [H], of far tokens' [H], mean of what is lost [H, D]), written out."""
    full, _ = dense(inputs, None)
    lost = full - dense(inputs, window, sinks_H)[0]
    share_BT = weight_BT / (weight_BT > 0).sum()
    energy_BHT = torch.einsum("chd,bhtd->bhtc", o_CHD, lost).square().sum(-1) * share_BT[:, None]
    return (
        energy_BHT[..., :window].sum((0, 2)),
        energy_BHT[..., window:].sum((0, 2)),
        (lost * share_BT[:, None, :, None]).sum((0, 2)),
    )


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(11, 4, 8, generator=generator), torch.rand(2, TOKENS, generator=generator)


@pytest.mark.parametrize("sink", [NONE, -2.0, 0.3, 2.0])
def test_errors_from_moments_are_those_written_out(sink: float) -> None:
    inputs, (o_CHD, weight_BT) = random_inputs(), weights()
    weight_BT[:, :2] = 0
    moments = summed(inputs, o_CHD, weight_BT)
    assert moments.tokens == 2 * (TOKENS - 2)
    fit = evaluate_sinks(moments, torch.full((3, 4), sink, dtype=torch.float64))
    for w, window in enumerate(WINDOWS):
        near_H, far_H, mean_HD = errors(inputs, o_CHD, weight_BT, torch.full((4,), sink), window)
        total_H = near_H + far_H
        torch.testing.assert_close(fit.lost_WH[w].float(), total_H, rtol=0.02, atol=1e-6)
        torch.testing.assert_close(fit.far_WH[w].float(), far_H, rtol=0.03, atol=1e-6)
        torch.testing.assert_close(fit.mean_WHD[w].float(), mean_HD, rtol=0.05, atol=5e-3)
    if sink == NONE:
        assert float(fit.near_WH.max()) < 1e-6, "a window that holds everything loses nothing"
        torch.testing.assert_close(fit.bare_WH, fit.lost_WH)


def test_mass_is_what_the_softmax_puts_outside() -> None:
    inputs, (o_CHD, weight_BT) = random_inputs(), weights()
    moments = summed(inputs, o_CHD, weight_BT)
    _, all_BHT = dense(inputs, None)
    for w, window in enumerate(WINDOWS):
        _, lse_BHT = dense(inputs, window)
        outside_BHT = (1 - (lse_BHT - all_BHT).exp())[..., window:]
        far_BT = weight_BT[:, window:]
        expected_H = (outside_BHT * far_BT[:, None]).sum((0, 2)) / far_BT.sum()
        torch.testing.assert_close(moments.mass_WH[w].float(), expected_H, rtol=1e-4, atol=1e-6)
        assert float(moments.weight_2W[FAR, w]) == pytest.approx(float(far_BT.sum() / weight_BT.numel()))
    torch.testing.assert_close(moments.weight_2W.sum(0).float(), weight_BT.mean().expand(3))
    assert torch.allclose(moments.cross_2WHN[NEAR], moments.square_2WHN[NEAR])


@pytest.mark.parametrize("centred", [False, True])
def test_no_sink_loses_less_than_the_one_that_is_found(centred: bool) -> None:
    inputs, (o_CHD, weight_BT) = random_inputs(), weights()
    fit = fit_sinks(summed(inputs, o_CHD, weight_BT), centred=centred)
    tried = [NONE, *nodes().tolist(), *(torch.arange(-60, 60) / 10).tolist()]
    for w, window in enumerate(WINDOWS):

        def lost(sink: float, window: int = window) -> Tensor:
            near_H, far_H, mean_HD = errors(inputs, o_CHD, weight_BT, torch.full((4,), sink), window)
            mean = torch.einsum("chd,hd->hc", o_CHD, mean_HD).square().sum(-1) / weight_BT.mean()
            return near_H + far_H - (mean if centred else 0)

        best_H = torch.stack([lost(sink) for sink in tried]).amin(0)
        own_H = torch.stack([lost(float(sink))[head] for head, sink in enumerate(fit.sinks_WH[w])])
        assert bool((own_H <= best_H * 1.02 + 1e-6).all()), (own_H, best_H)
        torch.testing.assert_close(fit.lost_WH[w].float(), own_H, rtol=0.05, atol=1e-5)


def test_keys_outside_that_only_take_mass_become_a_sink_and_those_with_values_do_not() -> None:
    tokens, mass = 64, 4.0
    q, k = torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4)
    v = torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(0))
    q[..., 0], k[..., 0, 0] = 1.0, mass  # the first token is looked at by all that come after
    v[:, 0, 0] = 0  # and gives nothing in head 0
    v[:, 1] = 0
    v[:, 1, 0] = 100  # and everything in head 1
    inputs = AttentionInputs(q, k, v, 1.0)
    sums = WindowSums((8,), torch.eye(8).view(8, 2, 4))
    weight_BT = torch.ones(1, tokens)
    weight_BT[:, :16] = 0
    sums.add(inputs, weight_BT)
    fit = fit_sinks(sums.finish(0))
    assert float(fit.sinks_WH[0, 0]) == pytest.approx(math.log(math.exp(mass) + 24), abs=0.6), "all mass outside"
    assert float(fit.lost_WH[0, 0] / fit.bare_WH[0, 0]) < 0.2
    assert float(fit.sinks_WH[0, 1]) == NONE


def test_a_target_without_sinks_gets_none() -> None:
    inputs, (o_CHD, weight_BT) = random_inputs(), weights()
    fit = fit_sinks(summed(inputs, o_CHD, weight_BT), sinks=False)
    assert bool((fit.sinks_WH == NONE).all())
    assert torch.equal(fit.lost_WH, fit.bare_WH)


def test_a_window_as_long_as_the_layers_own_loses_nothing() -> None:
    inputs, (o_CHD, weight_BT) = random_inputs(window=8), weights()
    moments = summed(inputs, o_CHD, weight_BT)
    fit = fit_sinks(moments)
    assert float(fit.lost_WH[1:].max()) < 1e-5
    assert float(fit.bare_WH[0].min()) > 1e-3
    assert float(moments.mass_WH[1:].abs().max()) < 1e-6
