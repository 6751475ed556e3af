"""One token at a time of several sequences over a cache of fixed size: a step that can be replayed.

A step has static shapes and static memory: the token, its position and the cache stay where they are, so on CUDA the
whole step is captured once in a graph and replayed.

The cache is ours, not transformers' StaticCache, whose sliding windows count positions on the host (wrong when
replayed) and are copied whole at every token. A layer with a window of w tokens has w slots; position p stands in slot
p mod w. Keys carry their rotation, so the order of slots does not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from retrofit.kernels import decode
from retrofit.kernels.availability import CAPTURE_WARM_UP
from retrofit.kernels.registry import KernelChoice
from retrofit.model.families.experts import EXPERTS
from retrofit.model.spec import AttentionSpec

CHOICE = KernelChoice(decode.NAME, decode.NAME, "one token over a cache of fixed size")
_HOST_ROPE = ("dynamic", "longrope")


class Slots(StaticLayer):
    """Keys and values of one layer, [B, K, slots, D] each; `position` [1], shared by all layers, is the next one."""

    def __init__(self, keys_BKTD: Tensor, values_BKTD: Tensor, tokens: int, slots: int, position: Tensor) -> None:
        """keys, values: of the last T of `tokens` positions."""
        super().__init__(max_cache_len=slots)
        held = keys_BKTD.shape[2]
        self.position = position
        places = torch.arange(tokens - held, tokens, device=keys_BKTD.device)[-slots:] % slots
        self.keys, self.values = (
            _zeros_like(stored, slots).index_copy_(2, places, stored[:, :, -slots:])
            for stored in (keys_BKTD, values_BKTD)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put one token's keys and values into their slot; all slots are returned."""
        slot, keys, values = self.position % self.max_cache_len, stored(self, "keys"), stored(self, "values")
        keys.index_copy_(2, slot, key_states)
        values.index_copy_(2, slot, value_states)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Nothing counts by it: positions and the mask are given to the model."""
        return 0


class GrowingSlots(Slots):
    """Slots of a layer that starts empty: allocated at the first token, and enlarged where no position has wrapped."""

    def __init__(self, slots: int, window: int | None, position: Tensor) -> None:
        """slots: to begin with; window: of the layer, which has no more slots than that."""
        StaticLayer.__init__(self, max_cache_len=min(slots, window or slots))
        self.position, self.window = position, window

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = (_zeros_like(x, self.max_cache_len) for x in (key_states, value_states))
            self.is_initialized = True
        return super().update(key_states, value_states)

    def grow(self, slots: int) -> None:
        """Have `slots` of them, or the window's."""
        before, slots = self.max_cache_len, min(slots, self.window or slots)
        if slots <= before:
            return
        self.max_cache_len = slots
        if not self.is_initialized:
            return
        held = stored(self, "keys"), stored(self, "values")
        self.keys, self.values = (_zeros_like(x, slots) for x in held)
        for larger, smaller in zip((self.keys, self.values), held, strict=True):
            larger[:, :, :before] = smaller


class Stepper(ABC):
    """B sequences that stand at the same position. `step` reads `token` [B, 1] and leaves the next one there.

    The model has to have the kernel of `CHOICE` meanwhile: `with using(model, CHOICE)`, after `decode.register()`.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Slots], token_B1: Tensor, position: Tensor) -> None:
        """layers: of the cache, which share `position` [1]."""
        self.model, self.slots, self.token, self.position = model, tuple(layers), token_B1, position
        self.cache = Cache(layers=list[Any](self.slots))
        self._graph: torch.cuda.CUDAGraph | None = None

    @abstractmethod
    def advance(self) -> None:
        """Compute the next token, and move on to the next position. Nothing in it may depend on the host."""

    @abstractmethod
    def reset(self) -> None:
        """Back to the first token; slots are written again."""

    def logits(self) -> Tensor:
        """Of the next token [B, V], from `token` at `position`, which both stay as they are."""
        index_S = torch.arange(max(layer.max_cache_len for layer in self.slots), device=self.token.device)
        visible = (index_S <= self.position)[None, None, None]
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
        """Compute one token of every sequence."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self.advance()

    def capture(self) -> None:
        """Make `step` the replay of a CUDA graph. Raises RuntimeError where the model waits for the host in a step."""
        side = torch.cuda.Stream(self.token.device)
        side.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARM_UP):
                self.reset()
                self.advance()
        torch.cuda.current_stream(self.token.device).wait_stream(side)
        self.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.advance()
        self._graph = graph
        self.reset()


def no_graph(model: PreTrainedModel, spec: AttentionSpec) -> str | None:
    """Why a step of this model cannot be captured in a CUDA graph; None where nothing is known against it."""
    if model.device.type != "cuda":
        return f"graphs are CUDA's, and this is {model.device.type}"
    if spec.family in EXPERTS:
        return "which experts a token goes to is decided on the host"
    if any(layer.rope is not None and layer.rope.rope_type in _HOST_ROPE for layer in spec.layers):
        return "its position encoding looks at the length on the host"
    return None


def stored(layer: object, part: Literal["keys", "values"]) -> Tensor:
    """Keys or values of one layer of a cache, which has them."""
    tensor = getattr(layer, part)
    assert isinstance(tensor, Tensor)
    return tensor


def _zeros_like(states_BKTD: Tensor, slots: int) -> Tensor:
    batch, heads, _, dim = states_BKTD.shape
    return torch.zeros(batch, heads, slots, dim, dtype=states_BKTD.dtype, device=states_BKTD.device)
