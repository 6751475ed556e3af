"""How our kernels stand in transformers: an attention function and a mask function, which refuse what they cannot do.

transformers gives an attention function the queries, keys and values of one layer, and whatever mask the mask function
of the same name made. Ours hands on a window, one number, and never makes a mask.

Legend: B batch, H query heads, K KV heads (H = s K), T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.errors import UserError

# (q [B, H, T, D], k [B, K, S, D], v [B, K, S, D], scale, window or None, sinks [H] or None) -> [B, H, T, D]
Attention = Callable[[Tensor, Tensor, Tensor, float, int | None, Tensor | None], Tensor]


def register(kernel: str, attention: Attention) -> None:
    """Make `kernel` known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(kernel, attention_function(kernel, attention))
    AttentionMaskInterface.register(kernel, window_mask)


def attention_function(kernel: str, attention: Attention) -> Callable[..., tuple[Tensor, None]]:
    """`attention` as transformers' AttentionInterface calls it -> (out [B, T, H, D], None).

    The function raises UserError for what the kernel cannot express: a mask, dropout, softcap, a position bias,
    bidirectional attention, sinks that are not one logit for each query head.
    """

    def forward(
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
        window = visible_window(kernel, module, attention_mask, dropout, sliding_window, softcap, **kwargs)
        if s_aux is not None and s_aux.shape != query.shape[1:2]:
            _refuse([f"sinks {tuple(s_aux.shape)}"], type(module).__name__, f"the {kernel} kernel")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, scale, window, s_aux).transpose(1, 2), None

    return forward


def visible_window(
    kernel: str,
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> int | None:
    """Tokens a query of this layer sees (None: all before it), from what transformers gives an attention function.

    attention_mask: None or what `window_mask` returned, which goes before the layer's own `sliding_window`.

    Raises: UserError, naming `kernel`, for what is neither causal attention nor a sliding window.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    refused = {
        "an explicit attention mask": attention_mask is not None and attention_mask.dim() > 0,
        "a mask that is neither causal nor a sliding window": attention_mask is not None
        and attention_mask.dim() == 0
        and int(attention_mask) < 0,
        "attention dropout": dropout != 0.0,
        "softcapped scores": softcap is not None,
        "a position bias": kwargs.get("position_bias") is not None,
        "a paged cache": kwargs.get("cache") is not None,
        "bidirectional attention": not causal,
        "attention weights as output": bool(kwargs.get("output_attentions")),
    }
    _refuse([what for what, present in refused.items() if present], type(module).__name__, f"the {kernel} kernel")
    return sliding_window if attention_mask is None else int(attention_mask) or None


def window_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function of transformers' AttentionMaskInterface: the window as one number [] (0: none), never a mask.

    The mask, not the layer, says what eager attention sees: some classes make a sliding mask and do not tell the layer.
    A mask that is neither causal nor sliding is -1: a layer that reads it is refused, but some classes make one for
    layers they do not have.

    Raises: UserError as `check_mask`.
    """
    check_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)
    if mask_function is not None:
        last = torch.arange(q_length) + int(q_offset)
        first = (last - (local_size or kv_length + int(kv_offset)) + 1).clamp_min(0)
        zero = torch.zeros((), dtype=torch.long)
        sees = [bool(torch.all(mask_function(zero, zero, last, j))) for j in (first, last)]
        hidden = [bool(torch.any(mask_function(zero, zero, last, last + 1)))]
        if local_size is not None and bool((first > 0).any()):
            hidden.append(bool(torch.any(mask_function(zero, zero, last[first > 0], first[first > 0] - 1))))
        if not all(sees) or any(hidden):
            return torch.tensor(-1)
    return torch.tensor(local_size or 0)


def check_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> None:
    """Refuses what a mask would have to say beyond causality and a window.

    Raises: UserError for padding, packed documents or another overlay, and caches with unused slots (StaticCache).
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    refused = {
        "padding in the attention mask": padded,
        "packed documents (position ids that jump) or another mask overlay": not allow_is_causal_skip,
        "a cache with unused slots": int(q_offset) + q_length != int(kv_offset) + kv_length,
    }
    _refuse([what for what, present in refused.items() if present], "the attention mask", "a kernel without masks")


def _refuse(what: list[str], where: str, kernel: str) -> None:
    if what:
        raise UserError(
            f"{kernel} cannot express {' or '.join(what)}",
            where=where,
            fix="use kernel: sdpa (or eager); for padding, batch texts of equal length; for position ids that jump "
            "inside one text, pass an all-ones attention mask",
        )
