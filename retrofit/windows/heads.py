"""What the heads of a layer give under one window, by the fastest way that computes it.

Legend: B batch, T tokens, H query heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels import blockwise
from retrofit.kernels.captured import AttentionInputs
from retrofit.kernels.sinks import with_sinks
from retrofit.windows.nested import nested_windows


def as_it_is(inputs: AttentionInputs) -> Tensor:
    """What the output projection reads in the layer as it is, [B, T, H D]."""
    return joined(with_sinks(*_attention(inputs, inputs.window), inputs.sinks_H)[0])


def windowed(inputs: AttentionInputs, window: int, sinks_H: Tensor | None) -> Tensor:
    """The same under a window, no longer than the layer's own, with sinks in the place of its own, [B, T, H D]."""
    sinks_H = None if sinks_H is None else sinks_H.to(inputs.q_BHTD.device)
    return joined(with_sinks(*under(inputs, window), sinks_H)[0])


def under(inputs: AttentionInputs, window: int | None) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], log-sum-exp [B, H, T]) under a window, no longer than the layer's own, without sinks; None:
    all that the layer sees."""
    reach = inputs.window if window is None else min(window, inputs.window or window)
    return _attention(inputs, reach)


def joined(heads_BHTD: Tensor) -> Tensor:
    """Heads side by side, [B, T, H D]."""
    return heads_BHTD.transpose(1, 2).flatten(2)


def _attention(inputs: AttentionInputs, window: int | None) -> tuple[Tensor, Tensor]:
    device = inputs.q_BHTD.device
    if inputs.softcap is None and device.type in ("cpu", "cuda"):
        # The tiles of a GPU are in bfloat16, as the model is there later; a processor's lose nothing.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = (x.to(dtype) for x in (inputs.q_BHTD, inputs.k_BKSD, inputs.v_BKSD))
        with torch.autocast(device.type, enabled=False):
            out, lse = blockwise.with_lse(q, k, v, inputs.scale, window)
        return out.float(), lse
    chunks = [(out[0], lse[0]) for _, out, lse in nested_windows(inputs, () if window is None else (window,))]
    outs, lses = zip(*chunks, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)
