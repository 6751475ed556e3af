"""Methods that look at weights alone: each changed tensor is computed when the writer comes to it, and not kept.

A layer is read without the tensors that pooling leaves alone, so the cost is that of its keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from retrofit.checkpoint.read import Checkpoint
from retrofit.kv_heads.merge import HeadMaps, apply_maps, contiguous_groups, first_maps, mean_maps
from retrofit.kv_heads.weights import read_layer, write_layer
from retrofit.model.spec import AttentionSpec, LayerAttention

PoolingMaps = Callable[[int, int, int], HeadMaps]

# (KV heads, groups, head dim) to maps that leave queries, output projection and the order of heads as they are.
POOLING: Mapping[str, PoolingMaps] = {"first": first_maps, "mean": mean_maps}


def pooled_tensors(
    checkpoint: Checkpoint, spec: AttentionSpec, target: AttentionSpec, maps: PoolingMaps, kv_heads: int
) -> dict[str, Callable[[], Tensor]]:
    """{changed tensor: what makes it}. A layer's tensors are made together, and kept until another layer is asked
    for (they may lie in several shards)."""
    made: dict[str, Callable[[], Tensor]] = {}
    last: dict[int, dict[str, Tensor]] = {}

    def make(layer: LayerAttention, name: str) -> Tensor:
        if layer.index not in last:
            last.clear()
            last[layer.index] = _pooled(checkpoint, layer, target.layers[layer.index], maps, kv_heads)
        return last[layer.index][name]

    for layer in spec.layers:
        for name in _changed(layer, kv_heads):
            made[name] = lambda layer=layer, name=name: make(layer, name)  # type: ignore[misc]
    return made


def _changed(layer: LayerAttention, kv_heads: int) -> list[str]:
    """Stored tensors that hold keys or values, and norm weights that differ from KV head to KV head."""
    slots = (layer.k, layer.v, layer.k_bias, layer.v_bias)
    names = [slot.name for slot in slots if slot is not None]
    if layer.k_norm is not None and not (layer.qk_norm == "head" and layer.qk_norm_weights == "shared"):
        separate = layer.qk_norm_weights == "separate"
        names += [layer.k_norm.format(head=head) for head in range(kv_heads)] if separate else [layer.k_norm]
    return list(dict.fromkeys(names))


def _pooled(
    checkpoint: Checkpoint, layer: LayerAttention, target: LayerAttention, maps: PoolingMaps, kv_heads: int
) -> dict[str, Tensor]:
    changed = _changed(layer, kv_heads)
    unread = {slot.name for slot in (layer.q, layer.o) if slot.name not in changed}
    transposed = {slot.name for slot in (layer.q, layer.o) if slot.transposed}

    if layer.o.name in unread and layer.o_bias is not None:
        unread.add(layer.o_bias.name)

    def read(name: str) -> Tensor:
        if name not in unread:
            return checkpoint.tensor(name)
        if len(checkpoint.shape(name)) == 1:
            return torch.empty(0)
        rows, columns = checkpoint.shape(name)
        of_model_width = (name == layer.q.name) == (name in transposed)  # the side that is no head's
        return torch.empty((0, columns) if of_model_width else (rows, 0))

    weights = read_layer(read, layer)
    merged = apply_maps(
        weights, maps(layer.kv_heads, kv_heads, layer.head_dim), contiguous_groups(layer.kv_heads, kv_heads)
    )
    tensors = write_layer(merged, target)
    return {name: tensors[name] for name in changed}
