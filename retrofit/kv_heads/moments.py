"""Second moments of one layer's queries, keys and values before RoPE: all that a merge needs to know of the text.

Legend: T tokens, H query heads, K KV heads, D head dim, P rotary pairs, U unrotated dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.errors import UserError


@dataclass(frozen=True)
class LayerMoments:
    """Means over tokens, float64.

    key_PKK: complex E[k_p k_p^H] over KV heads, per rotary pair. query_energy_KP: E|q_p|^2 summed over the query
    heads that read KV head k. key_rest [K, U, K, U] and query_rest_KUU: the same for dims that RoPE leaves alone.
    value_KDKD: E[v v^T] over all KV heads.
    """

    tokens: int
    key_PKK: Tensor
    query_energy_KP: Tensor
    key_rest: Tensor
    query_rest_KUU: Tensor
    value_KDKD: Tensor


class MomentSums:
    """Adds up the moments of a layer from chunks of tokens."""

    def __init__(self, kv_heads: int, indices: tuple[Tensor, Tensor, Tensor]) -> None:
        self._kv_heads = kv_heads
        self._x, self._y, self._rest = indices
        self._tokens = 0
        self._sums: list[Tensor] | None = None

    def add(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Add a chunk. Chunks are multiplied in fp32 and summed in fp64."""
        q_TKSD = q_THD.float().unflatten(1, (self._kv_heads, -1))
        k, v = k_TKD.float(), v_TKD.float()
        k_PKT = torch.complex(k[..., self._x], k[..., self._y]).permute(2, 1, 0)
        k_rest = k[..., self._rest].flatten(1)
        q_rest = q_TKSD[..., self._rest].permute(1, 0, 2, 3).flatten(1, 2)
        parts = [  # what follows is arithmetic on the CPU, wherever the model runs
            (k_PKT @ k_PKT.mH).to("cpu", torch.complex128),
            (q_TKSD[..., self._x].square() + q_TKSD[..., self._y].square()).sum((0, 2)).double().cpu(),
            (k_rest.T @ k_rest).double().cpu(),
            (q_rest.mT @ q_rest).double().cpu(),
            (v.flatten(1).T @ v.flatten(1)).double().cpu(),
        ]
        self._sums = parts if self._sums is None else [a + b for a, b in zip(self._sums, parts, strict=True)]
        self._tokens += q_THD.shape[0]

    def finish(self, layer: int) -> LayerMoments:
        """Raises UserError where a moment is not finite (the weights or the text gave NaN or infinity)."""
        assert self._sums is not None, "no tokens were added"
        key, energy, key_rest, query_rest, value = (s / self._tokens for s in self._sums)
        named = (("keys", key), ("queries", energy), ("keys", key_rest), ("queries", query_rest), ("values", value))
        for name, tensor in named:
            if not bool(torch.isfinite(torch.view_as_real(tensor) if tensor.is_complex() else tensor).all()):
                raise UserError(
                    f"the {name} of the calibration pass are not finite",
                    where=f"layer {layer}",
                    fix="check the checkpoint for NaN weights (`retrofit inspect MODEL`), or calibrate on other text",
                )
        k, u = self._kv_heads, len(self._rest)
        d = value.shape[0] // k
        return LayerMoments(
            tokens=self._tokens,
            key_PKK=key,
            query_energy_KP=energy,
            key_rest=key_rest.reshape(k, u, k, u),
            query_rest_KUU=query_rest,
            value_KDKD=value.reshape(k, d, k, d),
        )
