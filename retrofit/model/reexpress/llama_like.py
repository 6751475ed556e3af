"""What the targets with Llama's layers and a window for each share: fields, names of tensors, and one refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retrofit.errors import UserError
from retrofit.model.spec import AttentionSpec

KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_dropout",
)
_IF_THERE = ("original_max_position_embeddings", "max_sequence_length")


def fields_of(config: Any, spec: AttentionSpec) -> dict[str, Any]:
    """Fields of the target's configuration, the window of each layer among them."""
    first = spec.layers[0]
    windows = {layer.window for layer in spec.layers if layer.window}
    assert len(windows) <= 1, "one sliding_window for all layers"
    fields = {name: getattr(config, name) for name in KEPT}
    fields |= {name: value for name in _IF_THERE if (value := getattr(config, name, None)) is not None}
    return fields | {
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "rope_parameters": dict(config.rope_parameters),
        "layer_types": ["sliding_attention" if layer.window else "full_attention" for layer in spec.layers],
        # Their classes make a mask of this size, whether a layer reads it or not.
        "sliding_window": windows.pop() if windows else spec.max_position_embeddings,
    }


def names_of(spec: AttentionSpec, mlp: Sequence[str]) -> list[str]:
    """Every tensor of the source that the target has under the same name.

    mlp: those of an MLP, relative to it.
    """
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for layer in spec.layers:
        prefix = f"model.layers.{layer.index}"
        names += [f"{prefix}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        slots = (layer.q, layer.k, layer.v, layer.o, layer.q_bias, layer.k_bias, layer.v_bias, layer.o_bias)
        names += [slot.name for slot in slots if slot is not None]
        names += [f"{prefix}.mlp.{name}" for name in mlp]
    return names if spec.tied_embeddings else [*names, "lm_head.weight"]


def gated_mlp(*, bias: bool = False) -> list[str]:
    """Names of the tensors of a gated MLP."""
    return [f"{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")[: 1 + bias]]


def require_whole_heads(spec: AttentionSpec, target: str) -> None:
    """UserError for rotary parameters that turn a part of each head."""
    if any(layer.rope is not None and layer.rope.rotary_dim != layer.head_dim for layer in spec.layers):
        raise UserError(
            f"{target} turns whole heads, and this model a part of each",
            where="partial_rotary_factor of config.json",
            fix="convert it as it is, without re-expression",
        )
