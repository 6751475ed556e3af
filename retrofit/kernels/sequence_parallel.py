"""A model that runs with the tokens of every sequence shared out over the ranks of a group.

    ring = Ring.over(tokens, group)
    with sequence_parallel(ring, model):
        loss = model(**ring.inputs(ids_BT), labels=..., shift_labels=ring.next_tokens(ids_BT), num_items_in_batch=...)
        loss.backward()

Everything but attention works on one token at a time, so every rank runs the whole model over its own share, and the
attention of every layer goes round (`ring`). The sum of the ranks' losses, each divided by the number of tokens of all
ranks, is the loss; the sum of their parameters' gradients is its gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels import attention_interface, registry
from retrofit.kernels.ring import attention
from retrofit.kernels.ring_group import Ring
from retrofit.model.families import describe
from retrofit.model.frequencies import frequencies_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ring"


@contextmanager
def sequence_parallel(ring: Ring, *models: PreTrainedModel) -> Iterator[None]:
    """Inside the block, `models` take this rank's share of sequences of `ring.placement.tokens` tokens.

    The backward pass belongs inside, as gradient checkpointing runs the forward pass again. A model takes what
    `ring.inputs` returns: without its mask of ones, transformers reads positions that jump as packed documents.

    Raises: UserError for attention that cannot be split (`registry.split_kernel`), and from within the model for
    masks, packed documents, a KV cache or a share of another length.
    """
    with ExitStack() as stack:
        for model in models:
            spec, dtype = describe(model.config), str(model.dtype).removeprefix("torch.")
            choice = registry.split_kernel("auto", spec, model.device.type, dtype)
            _register(ring)
            stack.enter_context(registry.using(model, choice))
            stack.enter_context(frequencies_of(model, ring.placement.tokens))
        yield


def _register(ring: Ring) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    function = attention_interface.attention_function(NAME, functools.partial(attention, ring=ring))
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, functools.partial(_window_mask, ring.placement.tokens))


def _window_mask(
    tokens: int,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """`attention_interface.window_mask` of the whole sequence: positions inside a share say nothing about a window."""
    if int(q_offset) or kv_length != q_length:
        raise UserError(
            "a sequence over several ranks has no KV cache",
            where="the attention mask",
            fix="run the whole share at once, without past_key_values",
        )
    return attention_interface.window_mask(batch_size, tokens, tokens, 0, 0, mask_function, **kwargs)
