"""One layer's projections as head-shaped tensors, read from and written back to their slots.

Legend: H query heads, K KV heads, D head dim, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrofit.model.spec import LayerAttention, TensorSlot

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """Attention weights of one layer. Norm weights, as stored, stand here for each head, also where all share one."""

    q_HDC: Tensor
    k_KDC: Tensor
    v_KDC: Tensor
    o_CHD: Tensor
    q_bias_HD: Tensor | None = None
    k_bias_KD: Tensor | None = None
    v_bias_KD: Tensor | None = None
    o_bias_C: Tensor | None = None
    q_norm_HD: Tensor | None = None
    k_norm_KD: Tensor | None = None
    sinks_H: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.k_KDC.shape[0]

    def reorder(self, order: tuple[int, ...]) -> LayerWeights:
        """Put KV heads in `order`, moving each with the query heads that read it. The layer's function is unchanged."""
        if order == tuple(range(self.kv_heads)):
            return self
        s = self.q_HDC.shape[0] // self.kv_heads
        kv = torch.tensor(order)
        q = (kv[:, None] * s + torch.arange(s)).flatten()

        def rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return replace(
            self,
            q_HDC=self.q_HDC[q],
            k_KDC=self.k_KDC[kv],
            v_KDC=self.v_KDC[kv],
            o_CHD=self.o_CHD[:, q],
            q_bias_HD=rows(self.q_bias_HD, q),
            k_bias_KD=rows(self.k_bias_KD, kv),
            v_bias_KD=rows(self.v_bias_KD, kv),
            q_norm_HD=rows(self.q_norm_HD, q),
            k_norm_KD=rows(self.k_norm_KD, kv),
            sinks_H=rows(self.sinks_H, q),
        )


def _read_slot(read: Reader, slot: TensorSlot) -> Tensor:
    tensor = read(slot.name).float()
    if slot.transposed:
        tensor = tensor.T
    if slot.every is not None:
        return tensor.unflatten(0, (-1, slot.every))[:, slot.start : slot.stop].flatten(0, 1)
    return tensor if slot.start is None else tensor[slot.start : slot.stop]


def read_layer(read: Reader, layer: LayerAttention) -> LayerWeights:
    """Read one layer's attention in fp32; `read` gives a stored tensor by name."""
    h, k, d = layer.query_heads, layer.kv_heads, layer.head_dim

    def heads(slot: TensorSlot | None, count: int) -> Tensor | None:
        if slot is None:
            return None
        tensor = _read_slot(read, slot)
        return tensor.reshape(count, d, *tensor.shape[1:])

    def norm(name: str | None, count: int) -> Tensor | None:
        """Norm weights by head."""
        if name is None:
            return None
        if layer.qk_norm == "head" and layer.qk_norm_weights == "shared":
            return read(name).float().expand(count, d)
        if layer.qk_norm_weights == "separate":
            return torch.stack([read(name.format(head=head)).float() for head in range(count)])
        return read(name).float().reshape(count, d)

    q, key, v = heads(layer.q, h), heads(layer.k, k), heads(layer.v, k)
    assert q is not None and key is not None and v is not None
    o = _read_slot(read, layer.o)
    return LayerWeights(
        q_HDC=q,
        k_KDC=key,
        v_KDC=v,
        o_CHD=o.reshape(o.shape[0], h, d),
        q_bias_HD=heads(layer.q_bias, h),
        k_bias_KD=heads(layer.k_bias, k),
        v_bias_KD=heads(layer.v_bias, k),
        o_bias_C=None if layer.o_bias is None else _read_slot(read, layer.o_bias),
        q_norm_HD=norm(layer.q_norm, h),
        k_norm_KD=norm(layer.k_norm, k),
        sinks_H=None if layer.sinks is None else read(layer.sinks).float(),
    )


def write_layer(
    weights: LayerWeights, layer: LayerAttention, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Stored tensors of a layer by name. Fused tensors are put together again in the order of their rows.

    names: what to write, everything by default.
    """
    parts: dict[str, list[tuple[TensorSlot, Tensor]]] = {}

    def put(slot: TensorSlot | None, tensor: Tensor | None) -> None:
        if slot is not None and tensor is not None and (names is None or slot.name in names):
            parts.setdefault(slot.name, []).append((slot, tensor))

    put(layer.q, weights.q_HDC.flatten(0, 1))
    put(layer.k, weights.k_KDC.flatten(0, 1))
    put(layer.v, weights.v_KDC.flatten(0, 1))
    put(layer.o, weights.o_CHD.flatten(1, 2))
    for slot, bias in (
        (layer.q_bias, weights.q_bias_HD),
        (layer.k_bias, weights.k_bias_KD),
        (layer.v_bias, weights.v_bias_KD),
        (layer.o_bias, weights.o_bias_C),
    ):
        put(slot, None if bias is None else bias.flatten())
    out: dict[str, Tensor] = {}
    for name, rows in parts.items():
        rows.sort(key=lambda part: part[0].start or 0)
        first = rows[0][0]
        if first.every is None:
            tensor = torch.cat([part for _, part in rows])
        else:
            blocks = [part.unflatten(0, (-1, (slot.stop or 0) - (slot.start or 0))) for slot, part in rows]
            tensor = torch.cat(blocks, 1).flatten(0, 1)
        out[name] = (tensor.T if first.transposed else tensor).contiguous()
    for norm_name, norm in ((layer.q_norm, weights.q_norm_HD), (layer.k_norm, weights.k_norm_KD)):
        if norm_name is None or norm is None:
            continue
        if layer.qk_norm_weights == "separate":
            out |= {norm_name.format(head=head): row.contiguous() for head, row in enumerate(norm)}
        elif layer.qk_norm == "head" and layer.qk_norm_weights == "shared":
            out[norm_name] = norm[0].contiguous()
        else:
            out[norm_name] = norm.contiguous() if layer.qk_norm_weights == "stacked" else norm.flatten()
    if layer.sinks is not None and weights.sinks_H is not None:
        out[layer.sinks] = weights.sinks_H.contiguous()
    return out if names is None else {name: tensor for name, tensor in out.items() if name in names}
