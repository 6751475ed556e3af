"""Costs against a plain reference from the tokens themselves, the curve through measured points, and the loss that a
layer-wise pass finds."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.data.calibration import CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.layerwise_pass import layerwise_pass
from retrofit.kv_heads.calibrate.moments import LayerMoments, MomentSums, load, save, saved
from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.kv_heads.merge.folding import RotationAverage
from retrofit.kv_heads.merge.joint import calibrated_maps
from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.kv_heads.sweep.costs import Measured, fit_curve, layer_costs, probe_counts
from retrofit.model.spec import LayerAttention, RopeSpec, TensorSlot
from tests.tiny import save_tiny

T, H, K, D, C = 400, 8, 4, 6, 24
ROPE = RopeSpec("default", 1e4, rotary_dim=D)
SLOT = TensorSlot("unused")
LAYER = LayerAttention(3, H, K, D, D**-0.5, SLOT, SLOT, SLOT, SLOT, rope=ROPE)


def tokens() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(T, heads, D, generator=generator) for heads in (H, K, K))
    v[:, 1] = v[:, 0] + 0.3 * v[:, 1]  # two heads that nearly agree
    stream = torch.randn(T, C, generator=generator)
    stream[0] *= 1e3  # a massive activation
    return q, k, v, stream


def weights() -> LayerWeights:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(heads, D, C, generator=generator) for heads in (H, K, K))
    return LayerWeights(q, k, v, torch.randn(C, H, D, generator=generator))


def moments() -> LayerMoments:
    sums = MomentSums(K)
    sums.add(*tokens())
    return sums.finish(3)


def tail(rows: torch.Tensor, kept: int) -> float:
    """Energy per token that the best code of `kept` dims of these rows gives up: the small singular values."""
    return float(torch.linalg.svdvals(rows)[kept:].square().sum()) / len(rows)


def test_costs_match_a_plain_reference_from_the_tokens() -> None:
    found = layer_costs(moments(), weights(), LAYER, (1, 2, 4))
    q, k, v, stream = (tensor.double() for tensor in tokens())
    o = weights().o_CHD.double()
    per_head = [torch.linalg.cholesky(sum(o[:, h].T @ o[:, h] for h in (2 * i, 2 * i + 1))) for i in range(K)]
    seen = torch.stack([v[:, i] @ per_head[i] for i in range(K)], 1)  # |seen|^2 is the energy of the output
    kappa = torch.complex(k[..., : D // 2], k[..., D // 2 :])
    energy = q[..., : D // 2] ** 2 + q[..., D // 2 :] ** 2
    weighted = kappa * energy.unflatten(1, (K, 2)).sum(2).mean(0).sqrt()
    whole_v, whole_k = float(seen.square().sum()) / T, float(weighted.abs().square().sum()) / T
    for count, cost in found.items():
        lost_v = sum(tail(seen[:, list(group)].flatten(1), D) for group in cost.groups)
        lost_k = sum(tail(weighted[:, list(group), p], 1) for group in cost.groups for p in range(D // 2))
        assert cost.values == pytest.approx(lost_v / whole_v, rel=1e-3, abs=1e-6)
        assert cost.keys == pytest.approx(lost_k / whole_k, rel=1e-3, abs=1e-6)
        median = float(stream.square().mean(1).median())
        want = (lost_v / whole_v + lost_k / whole_k) * (whole_v / C) / (median + whole_v / C)
        assert cost.cost == pytest.approx(want, rel=0.02, abs=1e-9), count
    assert found[4].cost == 0
    assert found[4].values == 0
    assert found[4].keys == 0
    assert 0 < found[2].cost < found[1].cost
    assert (0, 1) in found[2].groups


def test_keys_are_priced_as_the_conversion_folds_them() -> None:
    sums = MomentSums(K)
    q, k, v, stream = tokens()
    k[..., 1] = k[..., 0] + 0.1 * k[..., 1]  # a direction in a pair of near frequency
    sums.add(q, k, v, stream)
    seen, turning = sums.finish(3), RotationAverage.over(np.array([1e-3, 9e-4, 8e-4]), 64)
    pairs, folded = (layer_costs(seen, weights(), LAYER, (1, 2, 4), way) for way in (None, turning))
    for count in (1, 2):
        assert folded[count].groups == pairs[count].groups
        assert folded[count].values == pairs[count].values
        _, wanted = calibrated_maps(seen, weights(), folded[count].groups, ROPE, turning=turning)
        assert folded[count].keys == pytest.approx(wanted.keys)
        assert folded[count].cost < pairs[count].cost
    assert folded[4].cost == 0


def test_a_few_massive_tokens_do_not_own_the_cost() -> None:
    plain = replace(moments(), stream_quantiles=(1.0, 1.0, 1.0, 1.0))
    massive = replace(plain, stream_energy=1e6, stream_quantiles=(1.0, 1.0, 1.0, 1e9))
    assert layer_costs(plain, weights(), LAYER, (1,)) == layer_costs(massive, weights(), LAYER, (1,))


def test_mean_pooled_keys_are_not_counted() -> None:
    normed = layer_costs(moments(), weights(), replace(LAYER, qk_norm="head", qk_norm_bias=True), (1,))[1]
    assert normed.keys is None
    assert 0 < normed.cost < layer_costs(moments(), weights(), LAYER, (1,))[1].cost


def test_moments_without_the_stream_are_a_user_error() -> None:
    with pytest.raises(UserError, match="without the residual stream"):
        layer_costs(replace(moments(), stream_quantiles=()), weights(), LAYER, (1,))


def test_kept_moments_give_the_same_prices(tmp_path: Path) -> None:
    save(tmp_path, 3, moments())
    again = layer_costs(load(tmp_path, 3), weights(), LAYER, (1, 2))
    for count, cost in layer_costs(moments(), weights(), LAYER, (1, 2)).items():
        assert again[count].groups == cost.groups
        assert again[count].cost == pytest.approx(cost.cost, rel=1e-5)


def test_the_curve_goes_through_what_was_measured() -> None:
    costs = {4: 0.0, 2: 0.1, 1: 0.4}
    one = fit_curve(costs, [Measured(1, 0.8, 0.1)])
    assert one is not None
    assert one.exponent == 1
    assert one.points == (1,)
    assert one.note is None
    assert one(0.4) == pytest.approx(0.8)
    assert one(0.1) == pytest.approx(0.2)
    assert one(0.0) == 0
    two = fit_curve(costs, [Measured(1, 0.8, 0.1), Measured(2, 0.1, 0.1)])
    assert two is not None
    assert two.points == (1, 2)
    assert two(0.4) == pytest.approx(0.8)
    assert two(0.1) == pytest.approx(0.1)
    assert two.exponent == pytest.approx(math.log(8) / math.log(4))


def test_points_that_say_nothing_are_left_out_and_told() -> None:
    costs = {2: 0.1, 1: 0.4}
    noise = fit_curve(costs, [Measured(1, 0.8, 0.1), Measured(2, -0.01, 0.1)])
    assert noise is not None
    assert noise.exponent == 1
    assert noise.points == (1,)
    assert noise.note is not None
    assert "2 KV heads lost nothing" in noise.note
    wrong = fit_curve(costs, [Measured(1, 0.8, 0.1), Measured(2, 0.9, 0.1)])
    assert wrong is not None
    assert wrong.exponent == 1
    assert "no less than 1" in str(wrong.note)
    assert fit_curve(costs, [Measured(1, -0.1, 0.1)]) is None


def test_the_fewest_heads_and_some_in_the_middle_are_probed() -> None:
    assert probe_counts((1,)) == (1,)
    assert probe_counts((1, 2, 4)) == (1, 2)
    assert probe_counts((1, 2, 4, 8, 16)) == (1, 4)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi", "gpt_bigcode", "olmoe"])
def test_a_layer_wise_pass_finds_the_loss_of_the_whole_model(family: str, tmp_path: Path) -> None:
    softcap = {"final_logit_softcapping": 5.0} if family == "gemma2" else {}
    source = save_tiny(tmp_path / "source", family, **softcap)
    ids = torch.randint(0, 256, (3, 300), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].transpose(1, 2)
    want = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)
    seen = CalibrationText(ids[:1], ("a",))
    found = layerwise_pass(source, ids, measured=seen, moments=tmp_path / "moments")
    assert torch.allclose(found.float(), want, atol=1e-4)
    assert saved(tmp_path / "moments") == (0, 1)
    assert load(tmp_path / "moments", 1).tokens == 300


def test_a_layer_wise_pass_multiplies_as_the_processor_does(tmp_path: Path, bfloat16_products: bool) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].transpose(1, 2)
    want = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)
    off = float((layerwise_pass(source, ids).float() - want).abs().max())
    assert (1e-5 < off < 0.05) if bfloat16_products else off < 1e-5


def test_a_pass_over_the_layers_holds_a_batch_and_not_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    ids = torch.randint(0, 256, (24, 512), generator=torch.Generator().manual_seed(1))
    read, alive, most = DiskTensors.read, [], [0]

    def counted(self: DiskTensors, index: int, device: str = "cpu") -> torch.Tensor:
        tensor = read(self, index, device)
        alive.append(weakref.ref(tensor))
        most.append(sum(one() is not None for one in alive))
        return tensor

    monkeypatch.setattr(DiskTensors, "read", counted)
    layerwise_pass(source, ids[12:], measured=CalibrationText(ids[:12], ("a", "b") * 6), moments=tmp_path / "moments")
    assert len(alive) > 10
    assert max(most) <= 2
