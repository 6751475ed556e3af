"""The attention kernels that compute one tile on a GPU and give its log-sum-exp; `tile_choice` takes one of them.

Calls follow PyTorch's own: aten's schemas, and torch.nn.attention._fa3 and _fa4 for the flash-attn packages.

Legend: B batch, H query heads, K KV heads (H = s K), T queries, S keys, D head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

_aten = torch.ops.aten

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Card:
    """What a choice depends on. capability: (9, 0) for Hopper. cudnn: version as torch counts, 91002 for 9.10.2; None
    without one. processors: streaming multiprocessors."""

    name: str
    capability: tuple[int, int]
    cudnn: int | None
    processors: int


@dataclass(frozen=True)
class TileBackend:
    """One kernel. package: on PyPI, None for PyTorch's own; modules do not tell, as flash-attn carries parts of
    flash-attn-4. head_dims: the largest by compute
    capability (major); a card that is not listed is not served.

    forward: (q, k, v, causal, scale) -> (out [B, H, T, D], lse [B, H, T] fp32, natural logarithm). backward: (grad, q,
    k, v, out, lse, causal, scale) -> (dq, dk, dv) of one tile, from the out and lse of the whole row. Both take fewer
    KV heads than query heads. splits_keys: it divides the keys among the processors by itself where queries are few.
    """

    name: str
    package: str | None
    head_dims: dict[int, int]
    forward: Forward
    backward: Backward
    splits_keys: bool = True
    needs_cudnn: bool = False

    def missing(self, installed: Callable[[str], bool]) -> str | None:
        """What is not installed, None where nothing is missing."""
        return None if self.package is None or installed(self.package) else f"{self.package} is not installed"

    def unsupported(self, card: Card, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot compute this on this card; None where it can."""
        most = self.head_dims.get(card.capability[0])
        if self.needs_cudnn and (card.cudnn is None or card.cudnn < 91000):
            return "cuDNN is older than 9.10"
        if most is None:
            return f"it is not for compute capability {card.capability[0]}.{card.capability[1]}"
        if dtype not in HALF:
            return f"it has no {str(dtype).removeprefix('torch.')}"
        if head_dim > most or head_dim % 8:
            return f"its head dims are multiples of 8 up to {most}"
        return None


# ---------------------------------------------------------------------------------------------- PyTorch's own


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's random state; there is no dropout
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused, scale=scale
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])  # [B, H, T, 1]


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1).contiguous(), unused, unused,
        None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- packages, [B, T, H, D]


def _fa3(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    module: Any = importlib.import_module("flash_attn_interface")
    out, lse, *_ = module._flash_attn_forward(
        *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=causal, num_splits=0
    )
    return out.transpose(1, 2), lse


def _fa3_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = importlib.import_module("flash_attn_interface")
    given = [x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out)]
    grads = [torch.empty_like(x) for x in given[1:4]]
    # By position: the last argument has had two names. In between are lengths of packed sequences.
    module._flash_attn_backward(*given, lse.contiguous(), *[None] * 6, *grads, scale, causal)
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _fa4(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    module: Any = importlib.import_module("flash_attn.cute.interface")
    out, lse, *_ = module._flash_attn_fwd(  # num_splits 0: as many as it thinks best
        *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=causal, return_lse=True, num_splits=0
    )
    return out.transpose(1, 2), lse.contiguous()


def _fa4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = importlib.import_module("flash_attn.cute.interface")
    g, *given = (x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out))
    dq, dk, dv, *_ = module._flash_attn_bwd(*given, g, lse.contiguous(), scale, causal)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


CUDNN = TileBackend("cuDNN", None, {9: 256, 10: 128}, _cudnn, _cudnn_backward, splits_keys=False, needs_cudnn=True)
FLASH_4 = TileBackend("FlashAttention 4", "flash-attn-4", {9: 256, 10: 128}, _fa4, _fa4_backward)
FLASH_3 = TileBackend("FlashAttention 3", "flash-attn-3", {9: 256}, _fa3, _fa3_backward)
FLASH = TileBackend(
    "PyTorch's FlashAttention 2", None, {8: 256, 9: 256, 10: 256, 11: 256, 12: 256}, _flash, _flash_backward
)
BACKENDS = (CUDNN, FLASH_4, FLASH_3, FLASH)
