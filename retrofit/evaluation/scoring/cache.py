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
    """The same for a sliding-window layer: buffers hold the last window - 1 tokens and one chunk.

    To go back to where the tokens before the window are gone, what was seen there is kept aside: `mark`.
    """

    def __init__(self, window: int, chunk: int) -> None:
        super().__init__(window)
        self.length = window - 1 + chunk
        self.stop = 0  # slots of the buffers that are written; the last ones are in the window
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.marks: dict[int, tuple[Tensor, ...]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is None:
            self.buffers = _allocate(key_states, self.length), _allocate(value_states, self.length)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        new, kept = key_states.shape[2], self._in_window()
        assert kept + new <= self.length, (
            f"a chunk of {new} tokens in a buffer for {self.length - self.sliding_window + 1}"
        )
        if self.stop + new > self.length:
            self._put(self._seen())
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.stop : self.stop + new] = states
        self.stop += new
        self.cumulative_length += new
        self.keys, self.values = (buffer[:, :, self.stop - new - kept : self.stop] for buffer in self.buffers)
        return self.keys, self.values

    def mark(self) -> None:
        """Keep what going back to here takes."""
        if self.buffers is not None:
            self.marks[self.cumulative_length] = self._seen()

    def rewind(self, tokens: int) -> None:
        """Hold the first `tokens` tokens only: none, or as many as at a mark."""
        assert tokens in self.marks or tokens in (0, self.cumulative_length), f"no mark at {tokens}"
        if tokens != self.cumulative_length:
            self.stop, self.cumulative_length = 0, tokens
            self._put(self.marks[tokens] if tokens else ())
        self.marks = {position: seen for position, seen in self.marks.items() if position <= tokens}

    def _in_window(self) -> int:
        """Tokens that the next one still sees."""
        return min(self.stop, self.sliding_window - 1)

    def _seen(self) -> tuple[Tensor, ...]:
        """Copies of their keys and values."""
        assert self.buffers is not None
        return tuple(buffer[:, :, self.stop - self._in_window() : self.stop].clone() for buffer in self.buffers)

    def _put(self, seen: tuple[Tensor, ...]) -> None:
        """Have these keys and values at the front of the buffers, and nothing else."""
        self.stop = 0
        for buffer, states in zip(self.buffers or (), seen, strict=False):
            self.stop = states.shape[2]
            buffer[:, :, : self.stop] = states


class GrowingSlidingLayer(DynamicSlidingWindowLayer):
    """transformers' own, whose memory is that of its window too: not a view of all that one pass has computed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        first = max(0, keys.shape[2] - self.sliding_window + 1)
        self.keys, self.values = keys[:, :, first:].clone(), values[:, :, first:].clone()
        return keys, values


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A stock cache whose sliding-window layers let go of what left their window."""
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingSlidingLayer(stock.sliding_window) if type(stock) is DynamicSlidingWindowLayer else stock
        for stock in cache.layers
    ]
    return cache


def preallocated_cache(config: PreTrainedConfig, length: int, chunk: int) -> Cache:
    """A cache for `length` tokens given in chunks of at most `chunk`, with the layer kinds of `config`.

    It can go back to its start and to where it was marked (`mark`, `rewind`).

    Raises: UserError for layers that keep something else than keys and values.
    """
    layers: list[Any] = []
    for index, stock in enumerate(DynamicCache(config=config).layers):
        if type(stock) is DynamicSlidingWindowLayer:
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


def mark(cache: Cache) -> None:
    """Let `rewind` come back to here."""
    for layer in cache.layers:
        if isinstance(layer, PreallocatedSlidingLayer):
            layer.mark()


def rewind(cache: Cache, tokens: int) -> None:
    """Go back to the first `tokens` tokens in every layer: to the start, or to a mark."""
    for layer in cache.layers:
        layer.rewind(tokens)  # type: ignore[union-attr]


def _allocate(states: Tensor, length: int) -> Tensor:
    batch, heads, _, dim = states.shape
    return torch.empty((batch, heads, length, dim), dtype=states.dtype, device=states.device)
