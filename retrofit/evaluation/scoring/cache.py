"""A KV cache for prefill in chunks: allocated once, never concatenated.

`DynamicCache` copies everything it holds at every update, so a prefill of n chunks copies n^2 / 2 of them. These layers
write each chunk into a buffer of the final size and hand back views of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from retrofit.errors import UserError


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one full-attention layer in buffers [B, K, length, D].

    reach: how many tokens before a chunk the chunk is shown; None shows all. What is kept does not depend on it.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.reach: int | None = None
        self.seen = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is None:
            self.buffers = _allocate(key_states, self.length), _allocate(value_states, self.length)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        stop = self.seen + key_states.shape[2]
        assert stop <= self.length, f"{stop} tokens in a cache of {self.length}"
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.seen : stop] = states
        start = self._hidden()
        self.seen = stop
        self.keys, self.values = (buffer[:, :, start:stop] for buffer in self.buffers)
        return self.keys, self.values

    def _hidden(self) -> int:
        """Tokens at the beginning that the next chunk is not shown."""
        return 0 if self.reach is None else max(0, self.seen - self.reach)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen - self._hidden() + query_length, self._hidden()

    def get_seq_length(self) -> int:
        return self.seen

    def rewind(self, tokens: int) -> None:
        """Hold the first `tokens` tokens only; what stood behind them is overwritten by the next update."""
        assert 0 <= tokens <= self.seen
        self.seen = tokens


class PreallocatedSlidingLayer(DynamicSlidingWindowLayer):
    """The same for a sliding-window layer: buffers hold the last window - 1 tokens and one chunk."""

    def __init__(self, window: int, chunk: int) -> None:
        super().__init__(window)
        self.length = window - 1 + chunk
        self.held = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is None:
            self.buffers = _allocate(key_states, self.length), _allocate(value_states, self.length)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        new = key_states.shape[2]
        kept = min(self.held, self.sliding_window - 1)
        assert kept + new <= self.length, (
            f"a chunk of {new} tokens in a buffer for {self.length - self.sliding_window + 1}"
        )
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if kept < self.held:
                buffer[:, :, :kept] = buffer[:, :, self.held - kept : self.held].clone()
            buffer[:, :, kept : kept + new] = states
        self.held = kept + new
        self.cumulative_length += new
        self.keys, self.values = (buffer[:, :, : self.held] for buffer in self.buffers)
        return self.keys, self.values

    def rewind(self, tokens: int) -> None:
        """Only to the start: the tokens before the window are gone."""
        assert tokens == 0, "a sliding layer that keeps its window only cannot go back; ask for rewindable=True"
        self.held = self.cumulative_length = 0


class RewindableSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer that keeps every token, so that it can go back, and shows the last window only."""

    def __init__(self, window: int, length: int) -> None:
        super().__init__(window)
        self.store = PreallocatedLayer(length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = self.store.update(key_states, value_states)
        self.cumulative_length = self.store.seen
        start = max(0, self.store.seen - key_states.shape[2] - (self.sliding_window - 1))
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        return self.keys, self.values

    def rewind(self, tokens: int) -> None:
        """Hold the first `tokens` tokens only."""
        self.store.rewind(tokens)
        self.cumulative_length = tokens


def preallocated_cache(config: PreTrainedConfig, length: int, chunk: int, *, rewindable: bool = False) -> Cache:
    """A cache for `length` tokens given in chunks of at most `chunk`, with the layer kinds of `config`.

    rewindable: sliding layers keep all tokens, so that the cache can go back to any earlier one (`rewind`); without it
    they keep their window, and the cache can only start again.

    Raises: UserError for layers that keep something else than keys and values.
    """
    layers: list[Any] = []
    for index, stock in enumerate(DynamicCache(config=config).layers):
        if type(stock) is DynamicSlidingWindowLayer and rewindable:
            layers.append(RewindableSlidingLayer(stock.sliding_window, length))
        elif type(stock) is DynamicSlidingWindowLayer:
            layers.append(PreallocatedSlidingLayer(stock.sliding_window, chunk))
        elif type(stock) is DynamicLayer:
            layers.append(PreallocatedLayer(length))
        else:
            raise UserError(
                f"a {type(stock).__name__} cache cannot be filled in chunks",
                where=f"layer {index} of {config.model_type}",
                fix="use a model whose layers are full or sliding-window attention",
            )
    return Cache(layers=layers)


def rewind(cache: Cache, tokens: int) -> None:
    """Go back to the first `tokens` tokens in every layer."""
    for layer in cache.layers:
        layer.rewind(tokens)  # type: ignore[union-attr]


def _allocate(states: Tensor, length: int) -> Tensor:
    batch, heads, _, dim = states.shape
    return torch.empty((batch, heads, length, dim), dtype=states.dtype, device=states.device)
