"""Decoding as a serving engine does it: a cache of fixed size, several sequences at once, a step that can be replayed.

A step of Python's loop launches every kernel of a forward pass anew, which takes longer than the kernels of a small
model. Here a step has static shapes and static memory: the token, its position and the cache stay where they are, so
on CUDA the whole step is captured once in a graph and replayed.

The cache is ours, not transformers' StaticCache, whose sliding windows count positions on the host (wrong when
replayed) and are copied whole at every token. A layer with a window of w tokens has w slots; position p stands in slot
p mod w. Keys carry their rotation, so the order of slots does not matter.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from retrofit.evaluation.running import BatchCost
from retrofit.format import nbytes
from retrofit.kernels import decode
from retrofit.kernels.registry import KernelChoice, using
from retrofit.model.families.experts import EXPERTS
from retrofit.model.spec import AttentionSpec
from retrofit.system.memory import available_memory

CHOICE = KernelChoice(decode.NAME, decode.NAME, "one token over a cache of fixed size")
WARM_UP = 3  # steps before a capture: libraries choose their kernels and allocate what they keep
MOST_OF_FREE = 0.9  # of the free memory: libraries take some for themselves
_HOST_ROPE = ("dynamic", "longrope")


class Slots(StaticLayer):
    """Keys and values of one layer, [B, K, slots, D] each; `position` [1], shared by all layers, is the next one."""

    def __init__(self, keys_BKTD: Tensor, values_BKTD: Tensor, tokens: int, slots: int, position: Tensor) -> None:
        """keys, values: of the last T of `tokens` positions."""
        super().__init__(max_cache_len=slots)
        batch, heads, held, _ = keys_BKTD.shape
        self.position = position
        places = torch.arange(tokens - held, tokens, device=keys_BKTD.device)[-slots:] % slots
        self.keys, self.values = (
            torch.zeros(batch, heads, slots, stored.shape[-1], dtype=stored.dtype, device=stored.device).index_copy_(
                2, places, stored[:, :, -slots:]
            )
            for stored in (keys_BKTD, values_BKTD)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put one token's keys and values into their slot; all slots are returned."""
        slot, keys, values = self.position % self.max_cache_len, _stored(self, "keys"), _stored(self, "values")
        keys.index_copy_(2, slot, key_states)
        values.index_copy_(2, slot, value_states)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Nothing counts by it: positions and the mask are given to the model."""
        return 0


class Decoder:
    """Greedy decoding of B equal sequences after a prefill. `step` reads `token` [B, 1] and leaves the next one there.

    The model has to have the kernel of `CHOICE` meanwhile: `with using(model, CHOICE)`, after `decode.register()`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: AttentionSpec,
        prefill: DynamicCache,
        token_11: Tensor,
        batch: int,
        room: int,
    ) -> None:
        """prefill: the cache of one sequence; it is copied. token: the one that follows it. room: tokens to decode."""
        tokens = int(prefill.get_seq_length())
        device = token_11.device
        self.model, self._start = model, tokens
        self._first = token_11.expand(batch, 1).clone()
        self.token = self._first.clone()
        self.position = torch.full((1,), tokens, dtype=torch.long, device=device)
        slots = [min(layer.window or tokens + room, tokens + room) for layer in spec.layers]
        self.slots = tuple(
            Slots(
                _stored(layer, "keys").expand(batch, -1, -1, -1),
                _stored(layer, "values").expand(batch, -1, -1, -1),
                tokens,
                count,
                self.position,
            )
            for layer, count in zip(prefill.layers, slots, strict=True)
        )
        self.cache = Cache(layers=list[Any](self.slots))
        self._index_S = torch.arange(max(slots), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(_stored(layer, part).nbytes for layer in self.slots for part in ("keys", "values"))

    def logits(self) -> Tensor:
        """Of the next token [B, V], from `token` at `position`, which both stay as they are."""
        visible = (self._index_S <= self.position)[None, None, None]
        rows = self.token.shape[0]
        out = self.model(
            input_ids=self.token,
            attention_mask=visible,
            position_ids=self.position.expand(rows, 1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def step(self) -> None:
        """Decode one token of every sequence."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._advance()

    def reset(self) -> None:
        """Back to the first token after the prefill; its slots are written again."""
        self.token.copy_(self._first)
        self.position.fill_(self._start)

    def capture(self) -> None:
        """Make `step` the replay of a CUDA graph. Raises RuntimeError where the model waits for the host in a step."""
        side = torch.cuda.Stream(self.token.device)
        side.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.reset()
                self._advance()
        torch.cuda.current_stream(self.token.device).wait_stream(side)
        self.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        self._graph = graph
        self.reset()

    def _advance(self) -> None:
        self.token.copy_(self.logits().argmax(-1, keepdim=True))
        self.position.add_(1)


def _stored(layer: object, part: Literal["keys", "values"]) -> Tensor:
    """Keys or values of one layer of a cache, which has them."""
    tensor = getattr(layer, part)
    assert isinstance(tensor, Tensor)
    return tensor


def batch_costs(
    model: PreTrainedModel,
    spec: AttentionSpec,
    prefill: DynamicCache,
    token_11: Tensor,
    batches: Sequence[int],
    decode_tokens: int,
    bytes_per_second: float,
) -> tuple[BatchCost, ...]:
    """Speeds of decoding `decode_tokens` tokens of each of B equal sequences after a prefill, for each B of `batches`.

    prefill: the cache of one sequence, which stays as it is; token: the one that follows. On CUDA the step is measured
    as a graph too. A batch that does not fit into the memory that is free has a note instead of speeds.
    """
    decode.register()
    tokens, value = int(prefill.get_seq_length()), model.dtype.itemsize
    reason = no_graph(model, spec)
    found = []
    for batch in batches:
        held = batch * spec.kv_cache_bytes(tokens + decode_tokens, value)
        read = weights_read(model) + batch * spec.kv_cache_bytes(tokens, value)
        bound = batch * bytes_per_second / read
        needed, free = held + workspace_bytes(spec, tokens + decode_tokens, batch, value), free_bytes(model.device)
        if free is not None and needed > free * MOST_OF_FREE:
            note = f"not measured: it needs {nbytes(needed)}, and {nbytes(free)} of memory are free"
            found.append(BatchCost(batch, held, bound, (), (), note))
            continue
        with using(model, CHOICE):
            decoder = Decoder(model, spec, prefill, token_11, batch, decode_tokens)
            loop = _speed(decoder, decode_tokens)
            graph: tuple[float, ...] = ()
            note = f"no graph: {reason}" if reason else ""
            if reason is None:
                try:
                    decoder.capture()
                except RuntimeError as error:
                    note = f"no graph: {str(error).splitlines()[0]}"
                else:
                    graph = (_speed(decoder, decode_tokens),)
        found.append(BatchCost(batch, decoder.nbytes, bound, (loop,), graph, note))
        del decoder
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return tuple(found)


def _speed(decoder: Decoder, steps: int) -> float:
    """Tokens per second of all sequences together, after one step that is not counted."""
    decoder.step()
    decoder.reset()
    synchronize(decoder.token.device)
    began = time.perf_counter()
    for _ in range(steps):
        decoder.step()
    synchronize(decoder.token.device)
    return steps * decoder.token.shape[0] / (time.perf_counter() - began)


def weights_read(model: PreTrainedModel) -> int:
    """Bytes of the weights that every token reads: all but an input table that is not the output's as well."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table.weight, torch.Tensor)
    own = head is None or table.weight is not head.weight
    every = sum(parameter.nbytes for parameter in model.parameters())
    return every - (table.weight.nbytes if own else 0)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a tensor on `device` may still take; None where the system does not say."""
    if device.type != "cuda":
        return available_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def no_graph(model: PreTrainedModel, spec: AttentionSpec) -> str | None:
    """Why a step of this model cannot be captured in a CUDA graph; None where nothing is known against it."""
    if model.device.type != "cuda":
        return f"graphs are CUDA's, and this is {model.device.type}"
    if spec.family in EXPERTS:
        return "which experts a token goes to is decided on the host"
    if any(layer.rope is not None and layer.rope.rope_type in _HOST_ROPE for layer in spec.layers):
        return "its position encoding looks at the length on the host"
    return None


def workspace_bytes(spec: AttentionSpec, slots: int, batch: int, value: int) -> int:
    """About what a step needs beside weights and cache: one layer's scores and weights, two copies of the logits."""
    heads = max(layer.query_heads for layer in spec.layers)
    return batch * (heads * slots * (2 * 4 + value) + 2 * 4 * spec.vocab_size)
