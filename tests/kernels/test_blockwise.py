"""Blockwise attention against softmax written out with a mask, and against eager on tiny models of every family."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from retrofit.errors import UserError
from retrofit.kernels import attention_interface, blockwise, gemm_tile
from retrofit.kernels.registry import KernelChoice, using
from tests.tiny import FAMILIES, VARIANTS, VOCAB_SIZE, tiny_model

SHAPES = [(1, 1), (1, 9), (7, 7), (5, 12), (16, 40), (33, 33), (70, 71)]
WINDOWS = [None, 1, 2, 5, 16, 33, 100]
BLOCKWISE = KernelChoice("blockwise", "blockwise", "test")
FORWARD = attention_interface.attention_function("blockwise", blockwise.attention)


def visible(queries: int, keys: int, window: int | None) -> Tensor:
    """bool [T, S]: p - window < j <= p for the query at position p."""
    p, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    return (j <= p) & (j > p - (window or keys))


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible(q.shape[2], k.shape[2], window), -math.inf)
    return scores.softmax(-1) @ v


def random_qkv(
    queries: int, keys: int, *, heads: int = 6, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(2, heads, queries, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, dim)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("run", "side_by_side"), [(None, False), (3, False), (16, False), (None, True)])
def test_tiles_cover_every_visible_pair_once(window: int | None, run: int | None, side_by_side: bool) -> None:
    for queries, keys in SHAPES:
        seen = torch.zeros(queries, keys, dtype=torch.int)
        for tile in blockwise.tiles(queries, keys, window, run, side_by_side=side_by_side):
            n, m = tile.q1 - tile.q0, tile.k1 - tile.k0
            assert n > 0
            assert m > 0
            assert tile.kind == "full" or n == m
            shape = {"full": torch.ones(n, m), "causal": torch.ones(n, m).tril(), "edge": torch.ones(n, m).triu()}
            for at in range(0, tile.count * tile.step or 1, tile.step or 1):
                seen[tile.q0 + at : tile.q1 + at, tile.k0 + at : tile.k1 + at] += shape[tile.kind].int()
        assert torch.equal(seen, visible(queries, keys, window).int()), (queries, keys)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_masked_softmax(
    shape: tuple[int, int], window: int | None, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wide: as on a GPU, where equal tiles are computed at once."""
    monkeypatch.setattr(blockwise, "many_at_once", lambda q: wide)
    inputs = [x.requires_grad_() for x in random_qkv(*shape)]
    out, expected = blockwise.attention(*inputs, 0.3, window), reference(*inputs, 0.3, window)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    # The CPU op's exponential is good to 4e-7, in double precision too.
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


def test_without_gradients_the_values_are_the_same() -> None:
    inputs = random_qkv(16, 40, dtype=torch.float32)
    with torch.no_grad():
        plain = blockwise.attention(*inputs, 0.3, 5)
    torch.testing.assert_close(
        plain, blockwise.attention(*[x.requires_grad_() for x in inputs], 0.3, 5), rtol=0, atol=0
    )


def test_gradcheck() -> None:
    inputs = [x[:1, :, :, :4].contiguous().requires_grad_() for x in random_qkv(4, 7, heads=2, kv_heads=1)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: blockwise.attention(q, k, v, 0.5, 3), inputs, eps=1e-4, atol=1e-2, rtol=1e-2, nondet_tol=1e-6
    )


def test_merging_two_halves_of_the_keys_gives_the_whole() -> None:
    q, k, v = random_qkv(8, 40)
    whole, whole_lse = blockwise.block(q, k, v, False, 0.3)
    halves = [blockwise.block(q, k[:, :, part], v[:, :, part], False, 0.3) for part in (slice(0, 13), slice(13, 40))]
    out, lse = blockwise.merge(*halves[0], *halves[1])
    torch.testing.assert_close(out, whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=2e-6)


def test_a_gpu_computes_a_prefill_as_one_tile_and_a_window_as_few() -> None:
    assert len(blockwise.tiles(32_768, 32_768, None, side_by_side=True)) == 1
    assert len(blockwise.tiles(512, 131_072, None, side_by_side=True)) == 2
    assert len(blockwise.tiles(32_768, 32_768, 512, side_by_side=True)) == 3


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_keys_cut_into_parts_give_the_whole(parts: int) -> None:
    q, k, v = random_qkv(5, 40)
    whole, whole_lse = blockwise.block(q, k, v, False, 0.3)
    out, lse = blockwise.split_keys(q, k, v, 0.3, parts)
    torch.testing.assert_close(out.double(), whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=2e-6)


def test_memory_is_not_tokens_times_tokens() -> None:
    """The largest tensor that any operation makes, over a window and a cached chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    for queries, keys, window in ((2048, 2048, 128), (512, 4096, None), (2048, 2048, None)):
        q, k, v = (x[:1] for x in random_qkv(queries, keys, heads=2, kv_heads=1, dtype=torch.float32))
        with Largest() as largest:
            blockwise.attention(q, k, v, 0.3, window)
        assert largest.numel <= 2 * max(q.numel(), k.numel()) < queries * keys / 4


# ------------------------------------------------------------------------------------- bfloat16 matrix products


@pytest.mark.parametrize("scale", [0.25, 0.3])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_gemm_tile_is_as_good_as_bfloat16_allows(scale: float, kv_heads: int) -> None:
    q, k, v = random_qkv(40, 2100, kv_heads=kv_heads, dtype=torch.bfloat16)
    shift = blockwise.block(q, k[:, :, :40], v[:, :, :40], False, scale)[1]
    result = gemm_tile.full_tile(q, k, v, scale, shift)
    assert result is not None
    out, lse = blockwise.block(q.double(), k.double(), v.double(), False, scale)
    torch.testing.assert_close(result[0].double(), out, rtol=0, atol=4e-3)
    torch.testing.assert_close(result[1].double(), lse, rtol=0, atol=1e-2)


def test_gemm_tile_says_when_its_shift_overflows_and_attention_stays_right() -> None:
    q, k, v = random_qkv(32, 96, dtype=torch.bfloat16)
    k[:, :, 3] *= 200  # far above the scores of the queries' own chunk
    shift = blockwise.block(q, k[:, :, 64:], v[:, :, 64:], False, 1.0)[1]
    assert gemm_tile.full_tile(q, k[:, :, :64], v[:, :, :64], 1.0, shift) is None
    expected = reference(q.double(), k.double(), v.double(), 1.0, None)
    torch.testing.assert_close(blockwise.attention(q, k, v, 1.0).double(), expected, rtol=0, atol=3e-2)


def test_bfloat16_attention_uses_the_gemm_tile_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = gemm_tile.full_tile
    monkeypatch.setattr(gemm_tile, "full_tile", lambda *args: calls.append(1) or real(*args))
    q, k, v = random_qkv(600, 700, heads=3, kv_heads=1, dtype=torch.bfloat16)
    out = blockwise.attention(q, k, v, 0.25)
    assert calls
    torch.testing.assert_close(
        out.double(), reference(q.double(), k.double(), v.double(), 0.25, None), rtol=0, atol=2e-2
    )


# ------------------------------------------------------------------------------------- in transformers


def ids(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(VOCAB_SIZE - 8, (batch, tokens), generator=torch.Generator().manual_seed(2))


EXPRESSIBLE = [(family, {}) for family in FAMILIES if family != "gemma2"] + list(VARIANTS)


@pytest.mark.parametrize(("family", "over"), EXPRESSIBLE, ids=lambda value: str(value))
def test_logits_and_gradients_equal_eager(family: str, over: dict) -> None:
    model, tokens = tiny_model(family, **over), ids(70)
    expected = model(input_ids=tokens, labels=tokens)
    parameters = list(model.parameters())
    expected_grads = torch.autograd.grad(expected.loss, parameters)
    with using(model, BLOCKWISE):
        found = model(input_ids=tokens, labels=tokens)
        grads = torch.autograd.grad(found.loss, parameters)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma3_text", "olmo2", "phi3", "cohere"])
def test_cached_chunks_equal_eager(family: str) -> None:
    model, tokens = tiny_model(family, **({"sliding_window": 16} if family == "phi3" else {})), ids(70, batch=2)
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        cache = DynamicCache(config=model.config)
        with using(model, BLOCKWISE):
            parts = [
                model(input_ids=part, past_key_values=cache).logits for part in tokens.split([40, 3, 1, 25, 1], dim=1)
            ]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)


def test_an_all_ones_mask_is_no_mask_and_keeps_attention_across_a_position_jump() -> None:
    model, tokens = tiny_model("llama"), ids(20)
    jumped = torch.arange(20)[None] + (torch.arange(20)[None] >= 10) * 100
    ones = torch.ones_like(tokens)
    with torch.inference_mode():
        expected = model(input_ids=tokens, attention_mask=ones, position_ids=jumped, use_cache=False).logits
        with using(model, BLOCKWISE):
            found = model(input_ids=tokens, attention_mask=ones, position_ids=jumped, use_cache=False).logits
            with pytest.raises(UserError, match="packed"):
                model(input_ids=tokens, position_ids=jumped, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_mask_says_the_window_and_a_chunked_mask_is_refused() -> None:
    from transformers.masking_utils import (
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    def window(function: object, local_size: int | None, queries: int = 12, keys: int = 30) -> int:
        return int(attention_interface.window_mask(1, queries, keys, keys - queries, 0, function, local_size))

    assert window(causal_mask_function, None) == 0
    assert window(sliding_window_causal_mask_function(8), 8) == 8
    assert window(sliding_window_causal_mask_function(8), 9) == -1
    assert window(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), 8) == -1
    q, k, v = random_qkv(12, 30)
    with pytest.raises(UserError, match="neither causal nor"):
        FORWARD(torch.nn.Module(), q, k, v, torch.tensor(-1))
    # The layer itself may not know its window.
    out, _ = FORWARD(torch.nn.Module(), q, k, v, torch.tensor(8), scaling=0.3)
    torch.testing.assert_close(out.transpose(1, 2), reference(q, k, v, 0.3, 8), rtol=0, atol=2e-6)


def test_refuses_what_it_cannot_express() -> None:
    model, tokens = tiny_model("llama"), ids(12, batch=2)
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    with torch.inference_mode(), using(model, BLOCKWISE):
        with pytest.raises(UserError, match="padding"):
            model(input_ids=tokens, attention_mask=padded)
        with pytest.raises(UserError, match="explicit attention mask"):
            model(input_ids=tokens, attention_mask=torch.zeros(2, 1, 12, 12))
        with pytest.raises(UserError, match="unused slots"):
            model(input_ids=tokens, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    gemma2 = tiny_model("gemma2")
    with torch.inference_mode(), using(gemma2, BLOCKWISE), pytest.raises(UserError, match="softcapped"):
        gemma2(input_ids=tokens)
    q, k, v = random_qkv(4, 4)
    module = torch.nn.Module()
    for name, value in {"dropout": 0.1, "s_aux": q, "position_bias": q, "is_causal": False}.items():
        with pytest.raises(UserError, match="cannot express"):
            FORWARD(module, q, k, v, None, **{name: value})
    with pytest.raises(UserError, match="one head dim"):
        blockwise.attention(q, k, v[..., :8], 1.0)
