"""Caches of fewer bits: to the bit what gguf and a table of float8 give, and read by every layer of every family."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from retrofit.evaluation.scoring.cache import growing_cache, preallocated_cache
from retrofit.kernels.registry import KernelChoice, using
from retrofit.kernels.rounded_cache import (
    ROUNDED,
    fp8_e4m3,
    hadamard,
    int8,
    round_cache,
    stored_keys,
    stored_values,
)
from retrofit.model.cache_dtype import CACHE_DTYPES, PAIRED, cache_bytes, unstorable
from retrofit.model.families import describe
from retrofit.recipe.evaluation import Evaluate
from tests.tiny import FAMILIES, tiny_config, tiny_model

IDS = torch.randint(5, 250, (1, 40), generator=torch.Generator().manual_seed(1))


def heads(*shape: int) -> torch.Tensor:
    """Values of very different magnitudes, blocks of zeros and ties among them."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(shape, generator=generator) * torch.logspace(-4, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    found[0] = 0.0
    found[1] = torch.linspace(-4, 4, shape[-1])  # with halves of its step
    found[2] = -found[2].abs()
    return found


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_blocks_are_those_of_gguf_to_the_bit(name: str) -> None:
    states = heads(64, 5, 96)
    kind = gguf.GGMLQuantizationType[name.upper()]
    expected = dequantize(quantize(states.numpy(), kind), kind)
    assert np.array_equal(ROUNDED[name](states).numpy(), expected)


def float8(code: int) -> float:
    """The value of an e4m3 code, from its bits: sign, exponent (bias 7), mantissa; no infinities."""
    sign, exponent, mantissa = (-1.0) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_float8_is_the_nearest_of_its_values_and_saturates() -> None:
    table = np.array(sorted(value for code in range(256) if not math.isnan(value := float8(code))))
    states = heads(64, 96)
    found = fp8_e4m3(states).numpy()
    nearest = np.abs(table[None] - np.clip(states.numpy().reshape(-1, 1).astype(np.float64), -448, 448)).min(1)
    assert np.isin(found, table).all()
    np.testing.assert_array_equal(
        np.abs(found.reshape(-1) - np.clip(states.numpy().reshape(-1).astype(np.float64), -448, 448)), nearest
    )
    assert fp8_e4m3(torch.tensor([1e6, -1e6])).tolist() == [448.0, -448.0]


def test_int8_has_a_scale_for_each_head() -> None:
    states = heads(16, 3, 48)
    found = int8(states)
    for head, rounded in zip(states.reshape(-1, 48).numpy(), found.reshape(-1, 48).numpy(), strict=True):
        scale = np.float32(max(np.abs(head).max() / np.float32(127), np.float32(1e-6)))
        codes = head * (np.float32(1) / scale)
        codes = np.clip(np.trunc(codes + np.copysign(np.float32(0.5), codes)), -128, 127).astype(np.float32)
        np.testing.assert_array_equal(rounded, codes * scale)


@pytest.mark.parametrize("width", [64, 128])
def test_the_rotation_is_its_own_inverse(width: int) -> None:
    matrix = hadamard(width, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(width), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix, matrix.T, atol=0, rtol=0)


def test_llama_cpp_rotates_where_the_head_dim_is_a_multiple_of_64() -> None:
    """Keys by the largest power of two that divides the head dim, values by 64: what attention makes of rotated
    queries and keys is what it makes of the keys given here."""
    states, queries = heads(8, 256), torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    for stored, width in ((partial(stored_keys, paired=False), 256), (stored_values, 64)):
        matrix = torch.block_diag(*[hadamard(width, torch.device("cpu"))] * (256 // width))
        scores = (queries @ matrix) @ ROUNDED["q4_0"](states @ matrix).T
        torch.testing.assert_close(queries @ stored(states, "q4_0").T, scores, rtol=1e-4, atol=1e-3)
    plain = heads(8, 96)
    assert torch.equal(stored_keys(plain, "q4_0", paired=False), ROUNDED["q4_0"](plain))
    assert torch.equal(stored_keys(states, "int8", paired=True), int8(states))


@pytest.mark.parametrize("width", [64, 96])
def test_blocks_of_keys_are_in_the_order_of_llama_cpps_converter(width: int) -> None:
    """Its converter reorders the rows of each head's projection: (2, D / 2) becomes (D / 2, 2)."""
    keys = heads(8, width)
    order = np.arange(width).reshape(2, width // 2).swapaxes(0, 1).reshape(-1)
    expected = torch.empty_like(keys)
    expected[:, order] = stored_keys(keys[:, order], "q4_0", paired=False)
    assert torch.equal(stored_keys(keys, "q4_0", paired=True), expected)
    assert not torch.equal(stored_keys(keys, "q4_0", paired=False), expected)


def reference(model: Any, cache_dtype: str) -> torch.Tensor:
    """Logits of one pass without a cache, whose attention function rounds keys and values."""
    paired = describe(model.config).family in PAIRED

    def rounding(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        k, v = stored_keys(k, cache_dtype, paired), stored_values(v, cache_dtype)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
        if (cap := kwargs.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        scores = scores + mask[..., : k.shape[-2]]
        if (sinks := kwargs.get("s_aux")) is not None:
            column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2), None
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("rounding_reference", rounding)
    AttentionMaskInterface.register("rounding_reference", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("rounding_reference")
    try:
        return whole(model)
    finally:
        model.set_attn_implementation(before)


def whole(model: Any) -> torch.Tensor:
    """Logits of one pass without a cache."""
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def in_chunks(model: Any, cache: Any, chunk: int) -> torch.Tensor:
    """Logits of a prefill in chunks."""
    with torch.inference_mode():
        parts = [model(input_ids=part, past_key_values=cache).logits for part in IDS.split(chunk, 1)]
    return torch.cat(parts, 1)


def assert_rounded(found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """`found` has all of the rounding of `expected` against `plain`, but for single values that the order of a sum
    carries over to the next code in a later layer."""
    effect = float((expected - plain).norm())
    assert effect > 1e-3
    assert float((found - expected).norm()) < 0.15 * effect


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_its_keys_and_values_rounded(family: str) -> None:
    """Without a cache, with a stock one and with ours, in chunks."""
    model = tiny_model(family)
    plain, expected = whole(model), reference(model, "int8")
    round_cache(model, "int8")
    assert_rounded(whole(model), expected, plain)
    for cache in (growing_cache(model.config), preallocated_cache(model.config, 40, 16)):
        assert_rounded(in_chunks(model, cache, 16), expected, plain)


@pytest.mark.parametrize("name", list(CACHE_DTYPES))
def test_every_type_is_read_by_blockwise_over_windows(name: str) -> None:
    model = tiny_model("granite_swa", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    plain, expected = whole(model), reference(model, name)
    round_cache(model, name)
    with using(model, KernelChoice("blockwise", "blockwise", "test")):
        assert_rounded(in_chunks(model, preallocated_cache(model.config, 40, 7), 7), expected, plain)


def test_auto_changes_nothing() -> None:
    model = tiny_model("llama")
    round_cache(model, "auto")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bytes_are_those_of_the_engines() -> None:
    spec = describe(tiny_config("mistral", head_dim=64, num_key_value_heads=2, sliding_window=100))
    layers = replace_windows(spec)
    for name, head in {"fp8_e4m3": 64, "int8": 68, "q8_0": 68, "q4_0": 36}.items():
        assert cache_bytes(spec, 50, name, 2) == 2 * 2 * 2 * 50 * head
        assert cache_bytes(layers, 500, name, 2) == 2 * 2 * (100 + 500) * head
    assert cache_bytes(spec, 50, "auto", 2) == spec.kv_cache_bytes(50, 2)


def replace_windows(spec: Any) -> Any:
    """The second layer without its window."""
    from dataclasses import replace

    return replace(spec, layers=(spec.layers[0], replace(spec.layers[1], window=None)))


def test_what_the_recipe_knows_is_what_there_is() -> None:
    annotation = Evaluate.model_fields["kv_cache_dtype"].annotation
    assert set(annotation.__args__) == {"auto", *CACHE_DTYPES} == {"auto", *ROUNDED}


def test_a_head_dim_without_whole_blocks_is_refused_as_llama_cpp_does() -> None:
    spec = describe(tiny_config("llama", head_dim=80))
    assert unstorable(spec, "q8_0") is not None
    assert unstorable(spec, "q4_0") is not None
    assert unstorable(spec, "int8") is None
    assert unstorable(spec, "auto") is None
