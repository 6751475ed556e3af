"""A full attention tile in bfloat16 through matrix products, for inference on a CPU.

PyTorch's CPU flash op multiplies bfloat16 tiles at a fraction of the rate of its own bfloat16 matrix product. When the
scores are roughly known, a tile without a mask needs no running maximum: with any shift m_i per query,

    p_ij = exp(s_ij - m_i),   lse_i = m_i + log sum_j p_ij,   out_i = sum_j p_ij v_j / sum_j p_ij

so one more column in q (-m_i) against ones in k makes the first product give s - m. The log-sum-exp over the query's
own chunk, which the causal tile has just computed, is a good m. Scores are rounded to bfloat16 after the shift, so the
large ones, near the shift, lose less than in eager attention, which rounds before it. Probabilities are rounded as in
any bfloat16 attention; they are summed in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS = 512  # query rows of one product, over the query heads of a KV head
_COLUMNS = 1024  # keys of one product
_ALIGN = 2  # the inner dim of a product is padded to a multiple of this: bfloat16 is multiplied in pairs


def usable(q: Tensor) -> bool:
    """Whether `full_tile` computes these queries: bfloat16 on a CPU, enough of them to fill a product."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] >= 16


def full_tile(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, shift_BHT: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(out [B, H, T, D], lse [B, H, T]), both fp32, of queries that see all keys; None when the shift was no good.

    shift: near the largest score of each query; more than 88 too low overflows, which is what None says.
    """
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    group, heads = H // K, B * K
    shift_BHT = shift_BHT.to(q_BHTD.dtype)
    q_NGTE = _queries(q_BHTD, scale, shift_BHT).reshape(heads, group, T, -1)
    copies = q_NGTE.shape[-1] // _padded(D + 1)
    k_NSE = _with_ones(k_BKSD).reshape(heads, S, -1).repeat(1, 1, copies)
    v_NSD = v_BKSD.reshape(heads, S, D)
    sums_NGTD = torch.empty((heads, group, T, D), dtype=torch.float32)
    weights_NGT = torch.empty((heads, group, T), dtype=torch.float32)
    rows = max(_ROWS // group, 16)
    for start in range(0, T, rows):
        part_NRE = q_NGTE[:, :, start : start + rows].reshape(heads, -1, q_NGTE.shape[-1])
        total_NRD = torch.zeros((heads, part_NRE.shape[1], D), dtype=torch.float32)
        weight_NR = torch.zeros(total_NRD.shape[:2], dtype=torch.float32)
        for column in range(0, S, _COLUMNS):
            p_NRC = torch.bmm(part_NRE, k_NSE[:, column : column + _COLUMNS].transpose(1, 2)).exp_()
            total_NRD += torch.bmm(p_NRC, v_NSD[:, column : column + _COLUMNS])
            weight_NR += p_NRC.sum(-1, dtype=torch.float32)
        sums_NGTD[:, :, start : start + rows] = total_NRD.view(heads, group, -1, D)
        weights_NGT[:, :, start : start + rows] = weight_NR.view(heads, group, -1)
    weight_BHT = weights_NGT.view(B, H, T)
    if not bool(torch.isfinite(weight_BHT).all()):
        return None
    out_BHTD = sums_NGTD.view(B, H, T, D) / weight_BHT.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return out_BHTD, shift_BHT.float() + weight_BHT.log()


def _queries(q: Tensor, scale: float, shift: Tensor) -> Tensor:
    """scale * q with the column -shift. A scale that is no power of two is kept exact as a sum of two bfloat16."""
    high = q * scale
    parts = [torch.cat([high, -shift[..., None], _zeros(high)], -1)]
    if math.frexp(scale)[0] != 0.5:
        low = (q.float() * scale - high.float()).to(q.dtype)
        parts.append(torch.cat([low, torch.zeros_like(shift[..., None]), _zeros(low)], -1))
    return torch.cat(parts, -1)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1]), _zeros(x)], -1)


def _zeros(x: Tensor) -> Tensor:
    """Columns that pad D + 1 to the aligned width."""
    return x.new_zeros((*x.shape[:-1], _padded(x.shape[-1] + 1) - x.shape[-1] - 1))


def _padded(width: int) -> int:
    return -(-width // _ALIGN) * _ALIGN
