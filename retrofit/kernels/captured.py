"""An attention function that computes nothing: it hands out what the attention of a layer is called with.

Queries and keys come as the layer's own class makes them, after norms and RoPE, so that code for one layer at a time
needs to know no family.

Legend: B batch, H query heads, K KV heads (H = s K), T queries, S keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retrofit.kernels.attention_interface import visible_window, window_mask

NAME = "captured"


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention reads. window: tokens that a query sees, itself included, None for all before it.
    softcap: scores become softcap tanh(score / softcap). sinks_H: one more logit of every softmax, by query head."""

    q_BHTD: Tensor
    k_BKSD: Tensor
    v_BKSD: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


class Captured(Exception):  # noqa: N818 - control flow, not an error
    """Ends the forward pass of a layer where its attention would begin."""

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__()
        self.inputs = inputs


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Raises `Captured`, and UserError for what is neither causal attention nor a sliding window."""
    window = visible_window(NAME, module, attention_mask, dropout, sliding_window, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.detach()
    raise Captured(AttentionInputs(query, key, value, scale, window, softcap, sinks))


def register() -> None:
    """Make it known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _capture)
    AttentionMaskInterface.register(NAME, window_mask)
