"""What `retrofit inspect MODEL` shows: from config.json and safetensors headers, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.files import holds_weights
from retrofit.model.families import Conversion, describe, family_of, stock_class
from retrofit.model.source import Source, resolve
from retrofit.model.spec import CACHE_LENGTHS, AttentionSpec, LayerAttention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class RopeSummary:
    """Rotary position encoding of some layers; parameters as stored in the configuration."""

    rope_type: str
    theta: float
    rotary_dim: int
    pairing: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose attention is the same. indices: for example "0-4, 6-10". biases: for example ("q", "k", "v").
    kv_cache_bytes: of these layers, by tokens.

    rope: None for layers without positions. window: tokens a sliding layer sees, None for all. sinks: each query head
    has a learned logit that takes probability.
    """

    indices: str
    count: int
    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None
    sinks: bool
    qk_norm: str | None
    biases: tuple[str, ...]
    rope: RopeSummary | None
    kv_cache_bytes: dict[int, int]


@dataclass(frozen=True)
class ConversionSummary:
    """One number of KV heads: possible or why not; kv_cache_bytes: the cache it would have, by tokens."""

    kv_heads: int
    possible: bool
    reason: str | None
    kv_cache_bytes: dict[int, int]


@dataclass(frozen=True)
class Inspection:
    """A model's attention and what can be done with it.

    parameters: number of values, tied matrices once. dtype: of the stored weights; cache sizes are in bytes in that
    dtype, for one sequence. kv_bytes_per_token: what each of the first tokens adds; kv_bytes_beyond_windows: what one
    adds when sliding windows are full. findings: what the RoPE linter says (empty: nothing wrong), as it was given;
    engines: what each engine that was tried makes of such a configuration.
    """

    model: str
    folder: str
    revision: str | None
    architecture: str
    family: str
    layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    query_heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    dtype: str
    license: str | None
    base_model: str | None
    groups: tuple[LayerGroup, ...]
    kv_bytes_per_token: int
    kv_bytes_beyond_windows: int
    kv_cache_bytes: dict[int, int]
    conversions: tuple[ConversionSummary, ...]
    findings: tuple[Any, ...]
    engines: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Undescribed:
    """A folder whose architecture is not known here: what the RoPE linter says of it all the same.

    reason: why nothing else is known.
    """

    model: str
    reason: str
    findings: tuple[Any, ...]
    engines: tuple[Any, ...]


def inspect(model: Source | str | Path, *, findings: Sequence[Any] = (), engines: Sequence[Any] = ()) -> Inspection:
    """Describe a model: a resolved `Source`, or whatever `source.resolve` takes (its weights are not fetched then).

    findings, engines: of its configuration (`retrofit.context.rope.lint`, `.tried`), shown as they are.
    Raises UserError as `source.resolve` does.
    """
    from retrofit.model.load import load_config

    source = model if isinstance(model, Source) else resolve(model, weights=False)
    config = load_config(source.folder)
    if holds_weights(source.folder):
        from retrofit.checkpoint.read import Checkpoint
        from retrofit.model.completeness import require_complete

        require_complete(Checkpoint.open(source.folder), config)
    spec = describe(config)
    first = spec.layers[0]
    value_bytes = _VALUE_BYTES[source.dtype]
    return Inspection(
        model=source.requested,
        folder=str(source.folder),
        revision=source.revision,
        architecture=stock_class(config),
        family=spec.family,
        layers=len(spec.layers),
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        tied_embeddings=spec.tied_embeddings,
        query_heads=first.query_heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        parameters=count_parameters(source.folder, config),
        dtype=source.dtype,
        license=source.license,
        base_model=source.base_model,
        groups=group_layers(spec, value_bytes),
        kv_bytes_per_token=spec.kv_bytes_per_token(value_bytes),
        kv_bytes_beyond_windows=spec.kv_bytes_beyond_windows(value_bytes),
        kv_cache_bytes=_cache_bytes(spec, value_bytes),
        conversions=tuple(_summary(c, spec, value_bytes) for c in family_of(config).conversions(spec)),
        findings=tuple(findings),
        engines=tuple(engines),
    )


def group_layers(spec: AttentionSpec, value_bytes: int = 2) -> tuple[LayerGroup, ...]:
    """Layers with equal attention together, in order of their first layer. value_bytes: of a value of the KV cache."""
    groups: list[tuple[LayerGroup, list[int]]] = []
    for layer in spec.layers:
        described = _describe_layer(layer)
        for group, indices in groups:
            if group == described:
                indices.append(layer.index)
                break
        else:
            groups.append((described, [layer.index]))
    return tuple(
        replace(
            group,
            indices=ranges(indices),
            count=len(indices),
            kv_cache_bytes={
                tokens: sum(spec.layers[index].kv_cache_bytes(tokens, value_bytes) for index in indices)
                for tokens in CACHE_LENGTHS
            },
        )
        for group, indices in groups
    )


def ranges(indices: Sequence[int]) -> str:
    """Ascending numbers as ranges: [0, 1, 2, 5] is "0-2, 5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def count_parameters(folder: Path, config: PretrainedConfig) -> int:
    """Stored values by the safetensors headers; without weights, those of the stock class built without memory.

    A head that is stored beside the embedding it is tied to does not count."""
    from math import prod

    if holds_weights(folder):
        from retrofit.checkpoint.read import Checkpoint
        from retrofit.model.completeness import tied_copy

        checkpoint = Checkpoint.open(folder)
        copies = (tied_copy(checkpoint, config) or ())[:1]
        return sum(prod(entry.shape) for name, entry in checkpoint.entries.items() if name not in copies)
    from retrofit.model.load import without_memory

    return sum(parameter.numel() for parameter in without_memory(config).parameters())


def _describe_layer(layer: LayerAttention) -> LayerGroup:
    biases = {"q": layer.q_bias, "k": layer.k_bias, "v": layer.v_bias, "o": layer.o_bias}
    rope = layer.rope
    norm = f"{'RMS' if layer.qk_norm_kind == 'rms' else 'layer'} norm over each head"
    return LayerGroup(
        indices="",
        count=0,
        query_heads=layer.query_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        scaling=layer.scaling,
        window=layer.window,
        softcap=layer.softcap,
        sinks=layer.sinks is not None,
        qk_norm=None if layer.qk_norm is None else norm if layer.qk_norm == "head" else "RMS norm over all heads",
        biases=tuple(name for name, slot in biases.items() if slot is not None),
        rope=None
        if rope is None
        else RopeSummary(rope.rope_type, rope.theta, rope.rotary_dim, rope.pairing, dict(rope.parameters)),
        kv_cache_bytes={},
    )


def _summary(conversion: Conversion, spec: AttentionSpec, value_bytes: int) -> ConversionSummary:
    layers = tuple(replace(layer, kv_heads=conversion.kv_heads) for layer in spec.layers)
    converted = _cache_bytes(replace(spec, layers=layers), value_bytes) if conversion.possible else {}
    return ConversionSummary(conversion.kv_heads, conversion.possible, conversion.reason, converted)


def _cache_bytes(spec: AttentionSpec, value_bytes: int) -> dict[int, int]:
    return {tokens: spec.kv_cache_bytes(tokens, value_bytes) for tokens in CACHE_LENGTHS}
