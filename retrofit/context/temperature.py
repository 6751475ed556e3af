"""Another attention factor than the written encoding's own, in the weights that make the queries.

YaRN multiplies cos and sin by an attention factor a = sqrt(1/t) (arXiv 2309.00071, section 3.4), and so the scores by
a^2, t being the temperature of the softmax. Its formula was fitted on Llama models; other models want another factor,
but some engines compute the formula whatever a configuration says. A score is linear in the query: with the
rotated dims of every query multiplied by (wanted / own)^2 all engines compute the wanted factor, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.context.fields import views
from retrofit.model.spec import LayerAttention, TensorSlot

if TYPE_CHECKING:
    from retrofit.checkpoint.rewrite import Rule
    from retrofit.model.spec import AttentionSpec


def extended_layers(spec: AttentionSpec, text: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    """Layers whose encoding an extension changes: those with RoPE, and where it differs by layer type, full ones."""
    by_type = any(view.layer_type for view in views(text))
    return tuple(layer for layer in spec.layers if layer.rope and not (by_type and layer.window))


def query_rules(spec: AttentionSpec, text: Mapping[str, Any], scale: float) -> dict[str, Rule]:
    """{stored tensor: rule} that multiplies the rotated dims of all queries by `scale`.

    text: the configuration of the language model. With a norm on queries, its weight is what is multiplied.
    """
    rules: dict[str, Rule] = {}
    for layer in extended_layers(spec, text):
        if layer.q_norm is not None:
            rules |= _of_norm(layer, scale)
            continue
        for slot in (layer.q, layer.q_bias):
            if slot is not None:
                rules[slot.name] = _of_slot(layer, slot, scale)
    return rules


def _of_slot(layer: LayerAttention, slot: TensorSlot, scale: float) -> Rule:
    """A rule on the projection, or its bias; the tensor may hold keys and values as well."""
    factors_D = _factors(layer, scale)

    def rule(name: str, stored: Tensor) -> list[tuple[str, Tensor]]:
        width = stored.shape[1] if slot.transposed else stored.shape[0]
        factors = torch.ones(width)
        blocks = factors.view(-1, slot.every or width)[:, slot.start : slot.stop]
        blocks.copy_(factors_D.repeat(blocks.numel() // len(factors_D)).view(blocks.shape))
        wide = factors if slot.transposed or stored.dim() == 1 else factors[:, None]
        return [(name, stored.float() * wide)]

    return rule


def _of_norm(layer: LayerAttention, scale: float) -> dict[str, Rule]:
    """Rules on the weight, and the bias, of the norm that queries go through."""
    assert layer.q_norm is not None
    factors_D, offset = _factors(layer, scale), layer.qk_norm_offset

    def weight(name: str, stored: Tensor) -> list[tuple[str, Tensor]]:
        found = stored.float() + offset
        return [(name, (found.view(-1, len(factors_D)) * factors_D).view(stored.shape) - offset)]

    def bias(name: str, stored: Tensor) -> list[tuple[str, Tensor]]:
        return [(name, (stored.float().view(-1, len(factors_D)) * factors_D).view(stored.shape))]

    separate = layer.qk_norm_weights == "separate"
    names = [layer.q_norm.format(head=h) for h in range(layer.query_heads)] if separate else [layer.q_norm]
    rules: dict[str, Rule] = {name: weight for name in names}
    if layer.qk_norm_bias:
        rules |= {name.removesuffix("weight") + "bias": bias for name in names}
    return rules


def _factors(layer: LayerAttention, scale: float) -> Tensor:
    """What each dim of a query is multiplied with, [D]: rotated dims come first."""
    assert layer.rope is not None
    factors_D = torch.ones(layer.head_dim)
    factors_D[: layer.rope.rotary_dim] = scale
    return factors_D
