"""Constant parts of keys and values: carried by biases exactly, and no direction is spent where a bias holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retrofit.kv_heads.calibrate.moments import MomentSums
from retrofit.kv_heads.merge.joint import apply_maps, calibrated_maps, rotary_indices
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer, write_layer
from retrofit.model.families import describe
from retrofit.model.spec import RopeSpec
from tests.kv_heads.test_convert import logits, run, text, with_twin_heads
from tests.tiny import tiny_model


def with_own_constants(family: str, folder: Path) -> Path:
    """Twin heads, but for large constants in the values, and in the unrotated dims of the keys, of each its own."""
    from transformers import AutoModelForCausalLM

    with_twin_heads(family, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in describe(model.config).layers:
            weights = read_layer(lambda name: state[name].detach().clone(), layer)
            assert weights.v_bias_KD is not None
            assert weights.k_bias_KD is not None
            rest = rotary_indices(layer.rope, layer.head_dim)[2]
            weights.v_bias_KD.add_(2 * torch.randn(weights.v_bias_KD.shape, generator=generator))
            weights.k_bias_KD[:, rest] += 2 * torch.randn(4, len(rest), generator=generator)
            for name, tensor in write_layer(weights, layer).items():
                state[name].copy_(tensor)
    model.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("family", "lossless"), [("phi", True), ("starcoder2", True), ("qwen2", False)])
def test_an_output_bias_holds_what_the_heads_constants_differ_in(family: str, lossless: bool, tmp_path: Path) -> None:
    source = with_own_constants(family, tmp_path / "source")
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    want = logits(source, ids)
    out = run(source, tmp_path / "out", kv_heads=2, repair="none", text=text(16))
    assert torch.allclose(logits(out, ids), want, atol=2e-3 * float(want.abs().max())) == lossless


@pytest.mark.parametrize("family", ["qwen2", "starcoder2", "phi"])
def test_biases_go_through_the_maps_exactly(family: str) -> None:
    """Merged projections with their biases give the merge of the old projections' results, constants included."""
    model = tiny_model(family)
    layer = describe(model.config).layers[0]
    state = dict(model.named_parameters())
    weights = read_layer(lambda name: state[name].detach(), layer)
    a = torch.randn(300, 64, generator=torch.Generator().manual_seed(2)) + 1

    def projected(w: LayerWeights) -> tuple[torch.Tensor, ...]:
        slots = ((w.q_HDC, w.q_bias_HD), (w.k_KDC, w.k_bias_KD), (w.v_KDC, w.v_bias_KD))
        return tuple(torch.einsum("tc,hdc->thd", a, m) + (0 if b is None else b) for m, b in slots)

    sums = MomentSums(4)
    sums.add(*projected(weights))
    groups = ((0, 3), (1, 2))
    maps, _ = calibrated_maps(sums.finish(0), weights, groups, layer.rope)
    merged = apply_maps(weights, maps, groups)
    (q, k, v), (q2, k2, v2) = projected(weights), projected(merged)
    for g, heads in enumerate(groups):
        index = list(heads)
        key = torch.einsum("sde,tse->td", maps.key_encode[index], k[:, index].double())
        value = torch.einsum("sde,tse->td", maps.value_encode[index], v[:, index].double())
        assert torch.allclose(k2[:, g].double(), key, atol=1e-4)
        assert torch.allclose(v2[:, g].double(), value, atol=1e-4)
        for s, head in enumerate(heads):
            want = torch.einsum("de,te->td", maps.query_map[head], q[:, head].double())
            assert torch.allclose(q2[:, 2 * g + s].double(), want, atol=1e-4)
    # What attention makes of a constant, attention weights summing to 1, ends in the output unchanged.
    if merged.o_bias_C is not None and weights.o_bias_C is not None:
        before = torch.einsum("hd,chd->c", v.mean(0), weights.o_CHD) + weights.o_bias_C
        after = torch.einsum("hd,chd->c", v2.mean(0).repeat_interleave(2, 0), merged.o_CHD) + merged.o_bias_C
        assert torch.allclose(before, after, atol=1e-4)


def test_a_constant_costs_nothing_where_a_bias_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 2, 4, generator=generator) for _ in "qkv")
    shift = 5 * torch.randn(2, 4, generator=generator)
    wide = torch.randn(16, 2, 4, generator=generator)
    plain = LayerWeights(*(torch.randn(2, 4, 16, generator=generator) for _ in "qkv"), wide)
    rope = RopeSpec("default", 1e4, 2)

    def lost(weights: LayerWeights, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
        sums = MomentSums(2)
        sums.add(q, k - k.mean(0), v - v.mean(0))
        whole = calibrated_maps(sums.finish(0), plain, ((0, 1),), rope)[1]
        sums = MomentSums(2)
        sums.add(q, k - k.mean(0) + shift * torch.tensor([0.0, 0, 1, 1]), v - v.mean(0) + shift)
        shifted = calibrated_maps(sums.finish(0), weights, ((0, 1),), rope)[1]
        assert whole.keys is not None
        assert shifted.keys is not None
        return shifted.keys / whole.keys, shifted.values / whole.values

    with_bias = replace(plain, o_bias_C=torch.zeros(16))
    keys, values = lost(with_bias, k, v)
    assert keys == pytest.approx(1, rel=1e-4)
    assert values == pytest.approx(1, rel=1e-4)
    assert lost(plain, k, v)[1] != pytest.approx(1, rel=1e-2)
