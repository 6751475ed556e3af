"""Decoding over a cache of fixed size: the logits are those of transformers' growing cache, for every family."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from retrofit.evaluation import decoding
from retrofit.evaluation.cost import run_cost
from retrofit.evaluation.decoding import Decoder, batch_costs
from retrofit.kernels import decode
from retrofit.kernels.registry import using
from retrofit.kernels.stepping import CHOICE, no_graph
from retrofit.model.families import describe
from tests.tiny import FAMILIES, tiny_model

PREFILL, STEPS = 40, 6


def prefilled(model: Any, ids_1T: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
    return cache


def both_ways(model: Any, prefill: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Logits [steps, batch or 1, vocabulary] of the same tokens over a cache of fixed size, and over a growing one."""
    decode.register()
    ids = torch.randint(0, 250, (1, prefill + STEPS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = prefilled(model, ids[:, :prefill])
        decoder = Decoder(model, describe(model.config), cache, ids[:, prefill : prefill + 1], batch, STEPS)
        found = []
        with using(model, CHOICE):
            for at in range(prefill, prefill + STEPS):
                decoder.token.copy_(ids[:, at : at + 1].expand(batch, 1))
                found.append(decoder.logits())
                decoder.position.add_(1)
        expected = [
            model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            for at in range(prefill, prefill + STEPS)
        ]
    return torch.stack(found), torch.stack(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_growing_cache(family: str) -> None:
    found, expected = both_ways(tiny_model(family), PREFILL)
    assert torch.allclose(found, expected.expand_as(found), atol=2e-5)


@pytest.mark.parametrize("window", [8, 39, 40, 43, 64])
def test_windows_shorter_and_longer_than_the_text_are_exact(window: int) -> None:
    found, expected = both_ways(tiny_model("mistral", sliding_window=window), PREFILL)
    assert torch.allclose(found, expected.expand_as(found), atol=2e-5)


def test_query_heads_share_one_kv_head() -> None:
    found, expected = both_ways(tiny_model("llama", num_key_value_heads=1), PREFILL)
    assert torch.allclose(found, expected.expand_as(found), atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_is_the_formula(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 1), (2, 10), (2, 10)))
    sinks, visible = torch.randn(4, generator=generator), torch.arange(10) < 7
    found = decode.attention(q, k, v, visible, 0.3, softcap, sinks)
    for batch in range(2):
        for head in range(4):
            scores = k[batch, head // 2, :7] @ q[batch, head, 0] * 0.3
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            weights = torch.softmax(torch.cat([scores, sinks[head : head + 1]]), 0)[:-1]
            assert torch.allclose(found[batch, head, 0], weights @ v[batch, head // 2, :7], atol=1e-6)


def test_a_decoder_writes_what_greedy_decoding_writes_and_can_begin_again() -> None:
    model, ids = tiny_model("gemma3_text"), torch.arange(1, 41)[None]
    decode.register()
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        decoder = Decoder(model, describe(model.config), cache, first, 3, STEPS)
        written = []
        with using(model, CHOICE):
            for _ in range(2):
                decoder.reset()
                written.append([(decoder.step(), decoder.token.clone())[1] for _ in range(STEPS)])
        expected, token = [], first
        for _ in range(STEPS):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            expected.append(token.expand(3, 1))
    assert torch.equal(torch.stack(written[0]), torch.stack(expected))
    assert torch.equal(torch.stack(written[1]), torch.stack(expected))
    assert model.config._attn_implementation == "eager"


def test_batches_are_measured_beside_one_another() -> None:
    (at,) = run_cost(tiny_model("llama"), [16], 4, speeds=decoding_speeds(), batches=(1, 3)).lengths
    assert [one.batch for one in at.batches] == [1, 3]
    assert at.batches[1].kv_bytes == 3 * at.batches[0].kv_bytes
    assert at.batches[0].kv_bytes == at.kv_bytes // 16 * 20
    assert all(one.loop_per_s is not None for one in at.batches)
    assert all(one.graph_per_s is None for one in at.batches)
    assert at.batches[0].note == "no graph: graphs are CUDA's, and this is cpu"
    assert at.batches[0].decode_bound == pytest.approx(at.decode_bound)
    assert at.batches[1].decode_bound > at.batches[0].decode_bound


def decoding_speeds() -> Any:
    return SimpleNamespace(bytes_per_second=1e9, flops_per_second=1e9)


def test_a_batch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.arange(1, 17)[None]
    spec = describe(model.config)
    one = spec.kv_cache_bytes(20, 4) + decoding.workspace_bytes(spec, 20, 1, 4)
    monkeypatch.setattr(decoding, "free_bytes", lambda device: int(one * 1.5))
    with torch.inference_mode():
        small, large = batch_costs(model, spec, prefilled(model, ids), ids[:, :1], (1, 2), 4, 1e9)
    assert small.loop_per_s is not None
    assert large.loop_per_s is None
    assert "of memory are free" in large.note


def test_what_a_graph_cannot_hold_is_known_beforehand() -> None:
    cuda = SimpleNamespace(device=torch.device("cuda"))
    spec = describe(tiny_model("llama").config)
    assert no_graph(cuda, spec) is None
    assert "experts" in str(no_graph(cuda, describe(tiny_model("mixtral").config)))
    rope = spec.layers[0].rope
    assert rope is not None
    scaled = replace(spec, layers=(replace(spec.layers[0], rope=replace(rope, rope_type="dynamic")),))
    assert "position encoding" in str(no_graph(cuda, scaled))


def test_a_step_that_cannot_be_captured_is_measured_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(decoder: Decoder) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(decoding, "no_graph", lambda model, spec: None)
    monkeypatch.setattr(Decoder, "capture", refused)
    model, ids = tiny_model("llama"), torch.arange(1, 17)[None]
    with torch.inference_mode():
        (one,) = batch_costs(model, describe(model.config), prefilled(model, ids), ids[:, :1], (2,), 4, 1e9)
    assert one.note == "no graph: operation not permitted when stream is capturing"
    assert one.loop_per_s is not None
    assert one.graph_per_s is None


def test_a_captured_step_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "no_graph", lambda model, spec: None)

    def captured(decoder: Decoder) -> None:  # a graph that does what was captured
        decoder._graph = SimpleNamespace(replay=decoder.advance)

    monkeypatch.setattr(Decoder, "capture", captured)
    model, ids = tiny_model("llama"), torch.arange(1, 17)[None]
    with torch.inference_mode():
        (one,) = batch_costs(model, describe(model.config), prefilled(model, ids), ids[:, :1], (2,), 4, 1e9)
    assert one.graph_per_s is not None
    assert one.note == ""
