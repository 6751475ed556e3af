"""What a model's attention is, as frozen data without torch.

Everything that converts, extends, prices or checks a model asks these records, never a model class. A `Family`
(`retrofit.model.families`) fills them from a configuration; tensor names and layouts are literal, never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Pairing = Literal["half", "interleaved"]
QKNorm = Literal["head", "full"]
QKNormKind = Literal["rms", "layer"]
QKNormWeights = Literal["shared", "stacked", "separate"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position encoding of one layer.

    pairing: "half" rotates (x_i, x_{i + rotary_dim/2}) together (Llama), "interleaved" (x_{2i}, x_{2i+1}) (Cohere).
    parameters: the `rope_parameters` of the configuration for this layer, as stored.
    """

    rope_type: str
    theta: float
    rotary_dim: int
    pairing: Pairing = "half"
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorSlot:
    """Where one projection lives: rows [start, stop) of a stored tensor (all rows when both are None).

    Rows are output features. `transposed` marks a Conv1D layout, where output features are the columns. every: the
    tensor is interleaved by head: these are rows [start, stop) of each block of so many.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    transposed: bool = False
    every: int | None = None


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one decoder layer. Weights are [out, in]; a bias slot is None where there is none.

    scaling: what scores are multiplied with (usually head_dim ** -0.5). window: sliding-window size in tokens.
    qk_norm: a norm on queries and keys before RoPE, over each "head" or the "full" projection; qk_norm_kind: RMS or
    (mean-subtracting) layer norm. qk_norm_weights: one weight [D] "shared" by all heads ([heads * D] for "full"), one
    tensor [heads, D] "stacked" (Cohere), or one tensor [D] per head, "separate" (StableLM), whose names are q_norm and
    k_norm with `{head}` filled in. qk_norm_eps: what the norm adds to the mean square. qk_norm_offset: what it adds to
    the stored weight (Gemma: 1). qk_norm_bias: the norm has a bias too (Phi). clip_qkv: projections are clamped to
    [-clip_qkv, clip_qkv] (OLMo). sinks: the tensor [query heads] with one more logit for each head's softmax, which
    takes probability and gives no value (gpt-oss).
    """

    index: int
    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    q: TensorSlot
    k: TensorSlot
    v: TensorSlot
    o: TensorSlot
    q_bias: TensorSlot | None = None
    k_bias: TensorSlot | None = None
    v_bias: TensorSlot | None = None
    o_bias: TensorSlot | None = None
    rope: RopeSpec | None = None
    window: int | None = None
    qk_norm: QKNorm | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    qk_norm_kind: QKNormKind = "rms"
    qk_norm_weights: QKNormWeights = "shared"
    qk_norm_eps: float = 0.0
    qk_norm_offset: float = 0.0
    qk_norm_bias: bool = False
    clip_qkv: float | None = None
    softcap: float | None = None
    sinks: str | None = None

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.query_heads // self.kv_heads

    def kv_cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of its keys and values at `tokens` tokens, of which a window keeps the last."""
        return 2 * self.kv_heads * self.head_dim * bytes_per_value * min(tokens, self.window or tokens)


@dataclass(frozen=True)
class MLP:
    """What stands beside the attention in a layer, as far as a training's memory depends on it.

    width: values of its hidden layer for each token; with experts, of all those that a token passes. adaptable: how
    much of that comes from linear modules, which can carry adapters; stacked experts cannot. gated: three matrices and
    not two. kept: tensors of that width that the backward pass needs.
    """

    width: int
    adaptable: int
    gated: bool
    kept: int


CACHE_LENGTHS = (8192, 32_768, 131_072)
"""Tokens at which the size of a KV cache is shown."""


def cache_lengths(positions: int) -> tuple[int, ...]:
    """Those that a model of so many positions holds, and all of its positions."""
    return (*(length for length in CACHE_LENGTHS if length < positions), positions)


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a whole model, and what stands beside it.

    module paths (`layers_path`, `attention_path`) are those of the transformers class, for hooks and layer-wise work:
    `model.layers` + `.{i}.` + `self_attn`. residual_scale: what the output projection's result is multiplied with
    before it is added to the residual stream; None where a norm stands between.
    """

    family: str
    layers: tuple[LayerAttention, ...]
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    mlp: MLP
    layers_path: str = "model.layers"
    attention_path: str = "self_attn"
    tied_embeddings: bool = False
    residual_scale: float | None = 1.0

    @property
    def learned_positions(self) -> int | None:
        """Entries of the table of positions, beyond which nothing can be read; None where positions are computed."""
        return None if any(layer.rope for layer in self.layers) else self.max_position_embeddings

    def with_kv_heads(self, kv_heads: int) -> AttentionSpec:
        """The same attention with `kv_heads` KV heads in every layer."""
        return replace(self, layers=tuple(replace(layer, kv_heads=kv_heads) for layer in self.layers))

    def with_windows(self, size: int, windowed: Collection[int]) -> AttentionSpec:
        """The same attention with windows of `size` tokens in these layers."""
        layers = tuple(replace(layer, window=size) if layer.index in windowed else layer for layer in self.layers)
        return replace(self, layers=layers)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes the KV cache grows by for each of the first tokens, which every window has room for."""
        return sum(layer.kv_cache_bytes(1, bytes_per_value) for layer in self.layers)

    def kv_bytes_beyond_windows(self, bytes_per_value: int = 2) -> int:
        """Bytes it grows by for each token once the windows are full."""
        return sum(layer.kv_cache_bytes(1, bytes_per_value) for layer in self.layers if layer.window is None)

    def kv_cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of the KV cache at `tokens` tokens; a sliding layer keeps its window only."""
        return sum(layer.kv_cache_bytes(tokens, bytes_per_value) for layer in self.layers)
