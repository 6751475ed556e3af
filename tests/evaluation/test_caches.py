"""Caches that hold a window's tokens where a layer has one: bounded, and exact to one masked pass for any chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache

from retrofit.evaluation.cost import cache_bytes, run_cost
from retrofit.evaluation.scoring.cache import growing_cache, mark, preallocated_cache, rewind
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import reading
from retrofit.evaluation.tasks.asking import TextReader, tokens_read
from retrofit.evaluation.tasks.needle import haystacks, needle
from retrofit.kernels.registry import KernelChoice, using
from retrofit.model.families import describe
from tests.evaluation.test_needle import PROSE
from tests.tiny import tiny_model, tiny_tokenizer

TOKENS = 90
IDS = torch.randint(5, 250, (1, TOKENS), generator=torch.Generator().manual_seed(3))
BLOCKWISE = KernelChoice("blockwise", "blockwise", "test")
WINDOWED = [
    ("mistral", {}),
    ("gemma3_text", {}),
    ("granite_swa", {"num_key_value_heads": 2}),
    ("granite_swa", {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3, "layer_rope_theta": [1e4] * 3}),
]


def windowed(family: str, over: dict[str, Any], window: int) -> Any:
    return tiny_model(family, **{**over, "sliding_window": window})


def whole(model: Any) -> Tensor:
    """Logits of one pass, with masks."""
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def in_chunks(model: Any, cache: Cache, chunks: list[int], start: int = 0) -> Tensor:
    """Logits of the tokens from `start` on."""
    with torch.inference_mode(), using(model, BLOCKWISE):
        parts = IDS[:, start : start + sum(chunks)].split(chunks, dim=1)
        return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize(
    ("chunk", "window"), [(1, 7), (6, 1), (6, 2), (6, 16), (16, 7), (16, 16), (16, 40), (64, 7), (64, 40), (64, 64)]
)
@pytest.mark.parametrize(("family", "over"), WINDOWED, ids=lambda value: str(value))
def test_chunks_smaller_and_larger_than_the_window_equal_one_masked_pass(
    family: str, over: dict[str, Any], chunk: int, window: int
) -> None:
    model = windowed(family, over, window)
    chunks = [chunk] * (TOKENS // chunk) + ([TOKENS % chunk] if TOKENS % chunk else [])
    expected = whole(model)
    for cache in (preallocated_cache(model.config, TOKENS, chunk), growing_cache(model.config)):
        torch.testing.assert_close(in_chunks(model, cache, chunks), expected, rtol=0, atol=1e-4)


def storages(cache: Cache) -> int:
    """Bytes of memory that a cache keeps from being freed, views counted as what they are views of."""
    found = {}
    for layer in cache.layers:
        marks = [tensor for seen in getattr(layer, "marks", {}).values() for tensor in seen]
        buffers = getattr(layer, "buffers", None) or (layer.keys, layer.values)
        found |= {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*buffers, *marks)}
    return sum(found.values())


@pytest.mark.parametrize("chunk", [1, 8, 32])
def test_memory_is_that_of_the_windows(chunk: int) -> None:
    model = windowed(*WINDOWED[3], window=16)
    each = 3 * 2 * 4 * 16 * 4  # bytes of a token: layers, keys and values, heads, dims, float32
    cache = preallocated_cache(model.config, TOKENS, chunk)
    in_chunks(model, cache, [chunk] * (TOKENS // chunk))
    assert storages(cache) == each * (15 + chunk)
    mark(cache)
    assert storages(cache) == each * (15 + chunk + 15)
    cache = growing_cache(model.config)
    in_chunks(model, cache, [TOKENS])
    assert storages(cache) == cache_bytes(cache) == each * 15


@torch.inference_mode()
def test_a_cache_goes_back_to_its_marks_when_their_window_is_long_gone() -> None:
    model = windowed("granite_swa", {}, window=7)
    expected, cache = whole(model), preallocated_cache(model.config, TOKENS, 10)
    in_chunks(model, cache, [10, 10, 4])
    mark(cache)
    in_chunks(model, cache, [10, 6], 24)
    mark(cache)
    in_chunks(model, cache, [10] * 4, 40)
    for position in (40, 40, 24):
        rewind(cache, position)
        found = in_chunks(model, cache, [10, 3], position)
        torch.testing.assert_close(found, expected[:, position : position + 13], rtol=0, atol=1e-4)
    with pytest.raises(AssertionError, match="no mark at 40"):
        cache.layers[1].rewind(40)
    rewind(cache, 0)
    torch.testing.assert_close(in_chunks(model, cache, [10] * 3), expected[:, :30], rtol=0, atol=1e-4)


def test_a_reader_goes_back_to_its_marks_only() -> None:
    for family in ("llama", "granite_swa"):
        model = tiny_model(family)
        with reading(model, None, None):
            reader = Reader(model, TOKENS, chunk=16)
            reader.read(IDS[0, :20])
            reader.mark()
            reader.read(IDS[0, 20:50])
            with pytest.raises(AssertionError, match="not marked at 50"):
                reader.rewind(50)
            reader.rewind(20)
            assert reader.position == 20


def test_haystacks_of_a_model_with_windows_are_read_once_where_they_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = windowed("granite_swa", {}, window=16), tiny_tokenizer()
    asked = {"lengths": (220,), "depths": (0.0, 0.4, 0.9)}
    read, real = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, ids: read.append(len(ids)) or real(self, ids))
    texts = haystacks(tokenizer, PROSE, **asked)
    with reading(model, None, None):
        for prompts in texts.values():
            one, alone = TextReader(model, tokenizer, prompts[0].length, 32), []
            read.clear()
            found = [one.answers(prompt, prompts[i + 1 :]) for i, prompt in enumerate(prompts)]
            questions = sum(read) - tokens_read(prompts, 32)
            for prompt in prompts:
                read.clear()
                alone.append(TextReader(model, tokenizer, prompt.length, 32).answers(prompt))
                questions -= sum(read) - len(prompt.ids)
            assert questions == 0, "of a text, what was not read before, and its questions"
            assert found == alone
    result = needle(model, tokenizer, PROSE, **asked, chunk=32)
    assert result.read < sum(len(prompt.ids) for some in texts.values() for prompt in some)


def test_a_measured_cost_counts_what_the_cache_holds() -> None:
    model = windowed("granite_swa", {}, window=16)
    spec = describe(model.config)
    (found,) = run_cost(model, [64], 2).lengths
    # A sliding layer holds one token less than its window between two passes: the next one is in it.
    assert found.kv_bytes_expected == spec.kv_cache_bytes(64, 4)
    assert found.kv_bytes_expected - found.kv_bytes == 2 * 4 * 16 * 4
