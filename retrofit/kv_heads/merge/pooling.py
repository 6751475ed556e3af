"""Methods that look at weights alone: each changed tensor is computed when the writer comes to it, and not kept.

A layer is read without the tensors that pooling leaves alone, so the cost is that of its keys and values.

Legend: K KV heads, G groups, S heads of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from retrofit.checkpoint.heap import give_back
from retrofit.checkpoint.read import Checkpoint
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer, write_layer
from retrofit.model.spec import AttentionSpec, LayerAttention

Shares = Callable[[int], Sequence[float]]

# Heads of a group to the share that each has in the new one. Mean pooling: GQA, arXiv 2305.13245, section 2.1.
POOLING: Mapping[str, Shares] = {
    "first": lambda size: (1.0, *(0.0,) * (size - 1)),
    "mean": lambda size: (1 / size,) * size,
}


def pooled_tensors(
    checkpoint: Checkpoint, spec: AttentionSpec, target: AttentionSpec, shares: Shares, kv_heads: int
) -> dict[str, Callable[[], Tensor]]:
    """{changed tensor: what makes it}. A layer's tensors are made together, and kept until another layer is asked
    for (they may lie in several shards)."""
    made: dict[str, Callable[[], Tensor]] = {}
    last: dict[int, dict[str, Tensor]] = {}

    def make(layer: LayerAttention, name: str) -> Tensor:
        if layer.index not in last:
            last.clear()
            give_back()
            last[layer.index] = _pooled(checkpoint, layer, target.layers[layer.index], shares, kv_heads)
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
    checkpoint: Checkpoint, layer: LayerAttention, target: LayerAttention, shares: Shares, kv_heads: int
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

    tensors = write_layer(pool(read_layer(read, layer), shares(layer.kv_heads // kv_heads)), target)
    return {name: tensors[name] for name in changed}


def pool(weights: LayerWeights, share_S: Sequence[float]) -> LayerWeights:
    """Each group of len(share_S) neighbouring KV heads as one; norm weights of keys are averaged."""
    k_norm, key, value = weights.k_norm_KD, _pool(weights.k_KDC, share_S), _pool(weights.v_KDC, share_S)
    assert key is not None and value is not None
    return replace(
        weights,
        k_KDC=key,
        v_KDC=value,
        k_bias_KD=_pool(weights.k_bias_KD, share_S),
        v_bias_KD=_pool(weights.v_bias_KD, share_S),
        k_norm_KD=None if k_norm is None else k_norm.unflatten(0, (-1, len(share_S))).mean(1),
    )


def _pool(tensor: Tensor | None, share_S: Sequence[float]) -> Tensor | None:
    """[K, ...] to [G, ...], summed in float64; a group at a time, which stays in the processor's cache."""
    if tensor is None:
        return None
    groups = tensor.unflatten(0, (-1, len(share_S)))
    pooled = tensor.new_empty(len(groups), *tensor.shape[1:])
    for new, heads in zip(pooled, groups, strict=True):
        weighted = torch.stack([head.double().mul_(share) for share, head in zip(share_S, heads, strict=True)])
        new.copy_(weighted.sum(0))
    return pooled
