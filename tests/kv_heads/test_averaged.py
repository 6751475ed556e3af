"""Values after attention against softmax attention written out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from retrofit.checkpoint.read import Checkpoint
from retrofit.kv_heads.calibrate.averaged import averaged_values, chosen_rows
from retrofit.kv_heads.calibrate.stream import LayerStream
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer
from retrofit.model.families import describe
from retrofit.model.load import load_config
from tests.tiny import save_tiny

LENGTH = 24


def plain(a_TC: torch.Tensor, weights: LayerWeights, theta: float, biased: bool) -> torch.Tensor:
    """[T, H, K, D]: causal softmax attention with half-split RoPE, every query head on every KV head's values."""
    h, d, _ = weights.q_HDC.shape
    k_heads = weights.k_KDC.shape[0]
    q, k, v = (torch.einsum("hdc,tc->htd", w, a_TC) for w in (weights.q_HDC, weights.k_KDC, weights.v_KDC))
    if biased:
        assert weights.q_bias_HD is not None
        assert weights.k_bias_KD is not None
        assert weights.v_bias_KD is not None
        q, k, v = q + weights.q_bias_HD[:, None], k + weights.k_bias_KD[:, None], v + weights.v_bias_KD[:, None]
    angle = torch.arange(len(a_TC))[:, None] * theta ** (-torch.arange(0, d, 2) / d)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    q, k = turned(q), turned(k)
    out = torch.zeros(len(a_TC), h, k_heads, d)
    for head in range(h):
        for t in range(len(a_TC)):
            scores = k[head // (h // k_heads), : t + 1] @ q[head, t] / d**0.5
            for kv in range(k_heads):
                out[t, head, kv] = scores.softmax(0) @ v[kv, : t + 1]
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_averaged_values_are_softmax_attention_over_every_pair_of_heads(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", family, num_attention_heads=4, num_key_value_heads=2)
    config = load_config(source)
    spec, checkpoint = describe(config), Checkpoint.open(source)
    stream = LayerStream(copy.deepcopy(config), spec, checkpoint.tensor)
    ids = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden, _ = stream.embed(ids)
    _, kwargs = stream.embed(ids[:1])
    layer = spec.layers[1]
    weights = read_layer(checkpoint.tensor, layer)
    with stream.layer(1) as run:
        before = run.head_outputs(hidden[:1], kwargs[1])
        a_BTC = run.attention_input(hidden, {**kwargs[1]})
        seen = list(averaged_values(run, weights, layer, hidden, kwargs[1]))
        assert torch.equal(run.head_outputs(hidden[:1], kwargs[1]), before), "the layer is as it was"
    assert layer.rope is not None
    for i in (0, 1):
        want = plain(a_BTC[i], weights, layer.rope.theta, biased=family == "qwen2")
        assert torch.allclose(seen[i], want, atol=1e-5 * float(want.abs().max()) + 1e-6)
    own = torch.stack([seen[0][:, head, head // 2] for head in range(4)], 1).flatten(1)
    assert torch.allclose(own, before[0], atol=1e-6), "the head that a query head reads is what the layer computes"


def test_sequences_are_chosen_evenly_over_kinds_and_within_them() -> None:
    kinds, sizes = ["a", "a", "b"], [(4, 10), (4, 10), (3, 10)]
    assert chosen_rows(kinds, sizes, 40) == {0: [0], 1: [0], 2: [0, 1]}
    assert chosen_rows(kinds, sizes, 1) == {0: [0], 2: [0]}
    everything = chosen_rows(kinds, sizes, 10_000)
    assert everything == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [0, 1, 2]}
