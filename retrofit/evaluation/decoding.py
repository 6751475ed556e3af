"""How fast a model decodes, as a serving engine does it: a cache of fixed size, several sequences at once.

A step of Python's loop launches every kernel of a forward pass anew, which takes longer than the kernels of a small
model; so on CUDA the step of `kernels.stepping` is measured as the replay of a graph too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from retrofit.evaluation.running import LOOP_STEPS, BatchCost
from retrofit.format import nbytes
from retrofit.kernels import decode
from retrofit.kernels.registry import using
from retrofit.kernels.stepping import CHOICE, Slots, Stepper, no_graph, stored
from retrofit.model.spec import AttentionSpec
from retrofit.system.memory import available_memory
from retrofit.system.speed import synchronize

MOST_OF_FREE = 0.9  # of the free memory: libraries take some for themselves


class Decoder(Stepper):
    """Greedy decoding of B equal sequences after a prefill."""

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
        self._start, self._first = tokens, token_11.expand(batch, 1).clone()
        position = torch.full((1,), tokens, dtype=torch.long, device=token_11.device)
        slots = [min(layer.window or tokens + room, tokens + room) for layer in spec.layers]
        layers = [
            Slots(
                stored(layer, "keys").expand(batch, -1, -1, -1),
                stored(layer, "values").expand(batch, -1, -1, -1),
                tokens,
                count,
                position,
            )
            for layer, count in zip(prefill.layers, slots, strict=True)
        ]
        super().__init__(model, layers, self._first.clone(), position)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(stored(layer, part).nbytes for layer in self.slots for part in ("keys", "values"))

    def reset(self) -> None:
        """Back to the first token after the prefill; its slots are written again."""
        self.token.copy_(self._first)
        self.position.fill_(self._start)

    def advance(self) -> None:
        """The most probable token follows."""
        self.token.copy_(self.logits().argmax(-1, keepdim=True))
        self.position.add_(1)


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
    as a graph too, and the loop is cut short. A batch that does not fit into the memory that is free has a note instead
    of speeds.
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
            loop = _speed(decoder, min(decode_tokens, LOOP_STEPS) if reason is None else decode_tokens)
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
    synchronize(str(decoder.token.device))
    began = time.perf_counter()
    for _ in range(steps):
        decoder.step()
    synchronize(str(decoder.token.device))
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


def workspace_bytes(spec: AttentionSpec, slots: int, batch: int, value: int) -> int:
    """About what a step needs beside weights and cache: one layer's scores and weights, two copies of the logits."""
    heads = max(layer.query_heads for layer in spec.layers)
    return batch * (heads * slots * (2 * 4 + value) + 2 * 4 * spec.vocab_size)
