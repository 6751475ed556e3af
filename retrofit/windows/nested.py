"""Attention of the same queries under several windows at once.

A window shows query i the keys at distance i - j < w. The windows are nested, so the keys between one and the next are
a band of distances; attention over each band gives (out, lse), and running log-sum-exps join them from near to far
(Milakov & Gimelshein 2018). Every score is computed once, whatever the number of windows. Rows are taken in chunks: the
scores of one chunk against one band are all that exists at a time.

Legend: W windows and last all that the layer sees, B batch, H query heads, K KV heads (H = s K), R rows (queries) of a
chunk, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from retrofit.kernels.blockwise import merge
from retrofit.kernels.captured import AttentionInputs
from retrofit.system.device import score_rows


def nested_windows(
    inputs: AttentionInputs, windows: Sequence[int], rows: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of rows: (rows, out [W + 1, B, H, R, D], lse [W + 1, B, H, R]), float32 at least.

    windows: ascending. rows: of a chunk, by default as many as the device takes at a time. The last entry is what the
    layer itself sees: its own window, or everything before; a window that is no smaller equals it. The layer's own
    sinks, if it has any, are no part of either.
    """
    assert list(windows) == sorted(set(windows)), "windows ascend"
    batch, heads, keys, _ = inputs.q_BHTD.shape
    assert keys == inputs.k_BKSD.shape[2], "whole sequences, no cache"
    rows = rows or score_rows(str(inputs.q_BHTD.device), batch * heads, keys)
    for start in range(0, keys, rows):
        stop = min(start + rows, keys)
        with torch.autocast(inputs.q_BHTD.device.type, enabled=False):
            yield slice(start, stop), *_rows(inputs, windows, start, stop)


def _rows(inputs: AttentionInputs, windows: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
    reach = min(inputs.window or stop, stop)
    edges = [0, *(min(window, reach) for window in windows), reach]
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for near, far in pairwise(edges):
        band = _band(inputs, start, stop, near, far)
        if not outs:
            assert band is not None, "a query sees itself"
            out, lse = band
        else:
            out, lse = (outs[-1], lses[-1]) if band is None else merge(outs[-1], lses[-1], *band)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def _band(inputs: AttentionInputs, start: int, stop: int, near: int, far: int) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of rows [start, stop) over the keys at distances [near, far); lse is -inf for a row that has none.
    None where no row has one."""
    first, last = max(0, start - far + 1), stop - near
    if last <= first or far <= near:
        return None
    k_heads = inputs.k_BKSD.shape[1]
    q = _wide(inputs.q_BHTD[:, :, start:stop]).unflatten(1, (k_heads, -1))  # [B, K, s, R, D]
    k, v = (_wide(x[:, :, None, first:last]) for x in (inputs.k_BKSD, inputs.v_BKSD))
    scores = (q * inputs.scale) @ k.mT
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    rows, keys = torch.arange(start, stop, device=q.device), torch.arange(first, last, device=q.device)
    distance = rows[:, None] - keys
    scores = scores.masked_fill_((distance < near) | (distance >= far), -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]) @ v
    return out.flatten(1, 2), lse.flatten(1, 2)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x
