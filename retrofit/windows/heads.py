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
    return _heads(inputs, inputs.window, inputs.sinks_H)


def windowed(inputs: AttentionInputs, window: int, sinks_H: Tensor | None) -> Tensor:
    """The same under a window, no longer than the layer's own, with sinks in the place of its own, [B, T, H D]."""
    return _heads(inputs, min(window, inputs.window or window), sinks_H)


def _heads(inputs: AttentionInputs, window: int | None, sinks_H: Tensor | None) -> Tensor:
    device, scale = inputs.q_BHTD.device, inputs.scale
    sinks_H = None if sinks_H is None else sinks_H.to(device)
    if inputs.softcap is None and device.type in ("cpu", "cuda"):
        # The tiles of a GPU are in bfloat16, as the model is there later; a processor's lose nothing.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = (x.to(dtype) for x in (inputs.q_BHTD, inputs.k_BKSD, inputs.v_BKSD))
        with torch.autocast(device.type, enabled=False):
            out = blockwise.attention(q, k, v, scale, window, sinks_H)
        return out.float().transpose(1, 2).flatten(2)
    sizes = () if window is None else (window,)
    chunks = [with_sinks(out[0], lse[0], sinks_H)[0] for _, out, lse in nested_windows(inputs, sizes)]
    return torch.cat(chunks, 2).transpose(1, 2).flatten(2)
