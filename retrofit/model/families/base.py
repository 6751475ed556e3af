"""What all families share: the description of a layer from literal choices, and which KV-head counts are possible.

Nothing here imports torch or transformers; a configuration is any object with the fields of the transformers class.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retrofit.errors import UserError
from retrofit.model.families.experts import EXPERTS
from retrofit.model.spec import (
    MLP,
    AttentionSpec,
    LayerAttention,
    Pairing,
    QKNorm,
    QKNormKind,
    QKNormWeights,
    RopeSpec,
)

Switch = bool | str
"""A fixed yes or no, or the name of the configuration field that says so."""


@dataclass(frozen=True)
class Conversion:
    """Whether a model can be converted to `kv_heads` KV heads per layer; `reason` says why not."""

    kv_heads: int
    possible: bool
    reason: str | None = None


@dataclass(frozen=True)
class QKNormTable:
    """How a family stores its norm on queries and keys; names are relative to the attention module.

    eps: the field of the configuration. offset, bias: as `LayerAttention.qk_norm_offset` and `qk_norm_bias`.
    """

    over: QKNorm
    q: str
    k: str
    kind: QKNormKind = "rms"
    weights: QKNormWeights = "shared"
    when: Switch = True
    eps: str = "rms_norm_eps"
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class Family(ABC):
    """One architecture: literal choices, each as the transformers class of that `model_type` makes it.

    scaling: "head_dim" (head_dim ** -0.5), "query_pre_attn_scalar" (that field ** -0.5), "attention_multiplier" (that
    field itself) or "scale_attn_weights" (head_dim ** -0.5 where that field is true, else 1). window: on "none", on
    "all" layers that the field sliding_window names, or on the layers whose entry in layer_types is
    "sliding_attention". window_when: a field that switches windows off altogether.
    partial_rotary: rope_parameters.partial_rotary_factor is read. own_head_dim: a head_dim field is read (else it is
    always hidden_size / query heads). rope_by_layer_type: rope_parameters hold one entry per layer type.
    no_rope_layers: the field of that name holds 0 for layers without RoPE. layer_rope_theta: the field of that name
    holds the base of each layer, 0 for one without RoPE. learned_positions: there is no RoPE at all. sinks: the tensor
    of attention sinks, relative to the attention module. residual: what stands between the output projection and the
    residual stream: nothing ("plain"), a factor ("residual_multiplier", that field) or a "norm".
    layers_path, attention_path: where the transformers class has its layers, and a layer its attention.
    mlp_gated: silu(gate) * up, three matrices (else two, around an activation). mlp_width, shared_expert_width: fields
    with the width of the MLP or of one expert, and of the expert that every token passes. mlp_kept: as `MLP.kept`.
    """

    name: str
    qkv_bias: Switch = False
    o_bias: Switch = False
    scaling: Literal["head_dim", "query_pre_attn_scalar", "attention_multiplier", "scale_attn_weights"] = "head_dim"
    window: Literal["none", "all", "layer_types"] = "none"
    window_when: Switch = True
    pairing: Pairing = "half"
    partial_rotary: bool = False
    own_head_dim: bool = True
    rope_by_layer_type: bool = False
    no_rope_layers: bool = False
    layer_rope_theta: bool = False
    learned_positions: bool = False
    sinks: str | None = None
    residual: Literal["plain", "residual_multiplier", "norm"] = "plain"
    qk_norm: QKNormTable | None = None
    softcap: bool = False
    clip_qkv: bool = False
    layers_path: str = "model.layers"
    attention_path: str = "self_attn"
    mlp_gated: bool = True
    mlp_width: str = "intermediate_size"
    mlp_kept: int = 4  # gate, its activation, up, and their product
    shared_expert_width: str | None = None

    @abstractmethod
    def tensors(self, config: Any, index: int, head_dim: int) -> dict[str, Any]:
        """The q, k, v, o and bias slots of layer `index`, as keyword arguments of `LayerAttention`."""

    def describe(self, config: Any) -> AttentionSpec:
        """The attention of a whole model.

        Raises UserError when the query heads cannot be shared out evenly over the KV heads.
        """
        query_heads, kv_heads = config.num_attention_heads, self.kv_heads(config)
        if query_heads % kv_heads:
            raise UserError(
                f"{query_heads} query heads cannot be shared evenly by {kv_heads} KV heads",
                where="num_attention_heads and num_key_value_heads of config.json",
                fix="check the configuration: num_key_value_heads must divide num_attention_heads",
            )
        return AttentionSpec(
            family=self.name,
            layers=tuple(self._layer(config, index) for index in range(config.num_hidden_layers)),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            mlp=self.mlp(config),
            layers_path=self.layers_path,
            attention_path=self.attention_path,
            tied_embeddings=bool(config.tie_word_embeddings),
            residual_scale=self._residual_scale(config),
        )

    def mlp(self, config: Any) -> MLP:
        """The MLP of a layer; where some layers have experts and others do not, of those that have."""
        width = getattr(config, self.mlp_width) or 4 * config.hidden_size
        if self.name not in EXPERTS:
            return MLP(width, width, self.mlp_gated, self.mlp_kept)
        shared = getattr(config, self.shared_expert_width) if self.shared_expert_width else 0
        return MLP(config.num_experts_per_tok * width + shared, shared, self.mlp_gated, self.mlp_kept)

    def conversions(self, spec: AttentionSpec) -> tuple[Conversion, ...]:
        """Every number of KV heads from 1 to the model's own, possible or with the reason why it is not."""
        current = spec.layers[0].kv_heads
        found = []
        for kv_heads in range(1, current + 1):
            divides = current % kv_heads == 0
            reason = None if divides else f"{kv_heads} does not divide {current} KV heads: groups would be unequal"
            found.append(Conversion(kv_heads, reason is None, reason))
        return tuple(found)

    def with_kv_heads(self, config: Any, kv_heads: int, spec: AttentionSpec | None = None) -> Any:
        """A copy of the configuration with `kv_heads` KV heads in every layer. spec: its description, if known.

        Raises UserError naming the possible numbers when this one is not.
        """
        spec = spec or self.describe(config)
        conversions = self.conversions(spec)
        chosen = next((c for c in conversions if c.kv_heads == kv_heads), None)
        if chosen is None or not chosen.possible:
            possible = ", ".join(str(c.kv_heads) for c in conversions if c.possible)
            current = spec.layers[0].kv_heads
            reason = chosen.reason if chosen else f"the model has {current} KV heads; conversion only makes them fewer"
            raise UserError(
                f"this {self.name} model cannot be converted to {kv_heads} KV heads: {reason}",
                where=f"kv_heads: {kv_heads}",
                fix=f"choose one of: {possible}",
            )
        changed = copy.deepcopy(config)
        self.set_kv_heads(changed, kv_heads)
        return changed

    def with_windows(self, config: Any, size: int, windowed: Collection[int]) -> Any:
        """A copy of the configuration in which the layers `windowed` have a sliding window of `size` tokens, and the
        others see everything; nothing else of any layer changes.

        Raises UserError, with what is possible, where the architecture cannot hold that.
        """
        layers = range(config.num_hidden_layers)
        problem = self._no_windows(config, frozenset(windowed), len(layers))
        if problem:
            what = f"this {self.name} model cannot have these windows: {problem[0]}"
            raise UserError(what, where="window.full_layers", fix=problem[1])
        changed = copy.deepcopy(config)
        if hasattr(changed, "use_sliding_window"):
            changed.use_sliding_window = bool(windowed)
        changed.sliding_window = size if windowed else None
        if self.window == "layer_types":
            changed.layer_types = ["sliding_attention" if i in windowed else "full_attention" for i in layers]
        return changed

    def _no_windows(self, config: Any, windowed: frozenset[int], layers: int) -> tuple[str, str] | None:
        """(why not, what to do) where exactly these layers cannot have windows."""
        if self.window == "none":
            return "its class has no sliding window", "choose a target that has: --target granite_swa, or mistral"
        if self.window == "all" and 0 < len(windowed) < layers:
            why = "its class has one window for all layers or none"
            return why, "leave no layer full (--full-layers 0), or choose another --target"
        if self.rope_by_layer_type:
            kinds = {
                layer_type(config, index): config.rope_parameters[layer_type(config, index)] for index in range(layers)
            }
            moved = [i for i in range(layers) if (layer_type(config, i) == "sliding_attention") != (i in windowed)]
            if moved and len({str(sorted(dict(rope or {}).items(), key=str)) for rope in kinds.values()}) > 1:
                own = [index for index in range(layers) if layer_type(config, index) != "sliding_attention"]
                why = "its layers with a window have another position encoding than those without"
                return why, f"leave its own layers full: --full-layers {','.join(map(str, own))}{',' * (len(own) == 1)}"
        return None

    def kv_heads(self, config: Any) -> int:
        """KV heads per layer."""
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def set_kv_heads(self, config: Any, kv_heads: int) -> None:
        """Write a possible number of KV heads into `config`."""
        config.num_key_value_heads = kv_heads

    def prefix(self, index: int) -> str:
        """Where the attention tensors of a layer live in the checkpoint."""
        return f"{self.layers_path}.{index}.{self.attention_path}."

    def head_dim(self, config: Any) -> int:
        """Features per head."""
        own = getattr(config, "head_dim", None) if self.own_head_dim else None
        return own or config.hidden_size // config.num_attention_heads

    def _layer(self, config: Any, index: int) -> LayerAttention:
        head_dim = self.head_dim(config)
        norm = self.qk_norm if self.qk_norm is not None and switched(config, self.qk_norm.when) else None
        prefix = self.prefix(index)
        return LayerAttention(
            index=index,
            query_heads=config.num_attention_heads,
            kv_heads=self.kv_heads(config),
            head_dim=head_dim,
            scaling=self._scaling(config, head_dim),
            rope=self._rope(config, index, head_dim),
            window=self._window(config, index),
            qk_norm=norm.over if norm else None,
            q_norm=prefix + norm.q if norm else None,
            k_norm=prefix + norm.k if norm else None,
            qk_norm_kind=norm.kind if norm else "rms",
            qk_norm_weights=norm.weights if norm else "shared",
            qk_norm_eps=float(getattr(config, norm.eps)) if norm else 0.0,
            qk_norm_offset=norm.offset if norm else 0.0,
            qk_norm_bias=norm.bias if norm else False,
            clip_qkv=config.clip_qkv if self.clip_qkv else None,
            softcap=config.attn_logit_softcapping if self.softcap else None,
            sinks=None if self.sinks is None else prefix + self.sinks,
            **self.tensors(config, index, head_dim),
        )

    def _scaling(self, config: Any, head_dim: int) -> float:
        if self.scaling == "attention_multiplier":
            return float(config.attention_multiplier)
        if self.scaling == "scale_attn_weights":
            return head_dim**-0.5 if config.scale_attn_weights else 1.0
        return (head_dim if self.scaling == "head_dim" else config.query_pre_attn_scalar) ** -0.5

    def _residual_scale(self, config: Any) -> float | None:
        if self.residual == "norm":
            return None
        return float(config.residual_multiplier) if self.residual == "residual_multiplier" else 1.0

    def _window(self, config: Any, index: int) -> int | None:
        if self.window == "none" or not switched(config, self.window_when):
            return None
        if self.window == "layer_types" and layer_type(config, index) != "sliding_attention":
            return None
        return config.sliding_window

    def _rope(self, config: Any, index: int, head_dim: int) -> RopeSpec | None:
        switches = (self.no_rope_layers, "no_rope_layers"), (self.layer_rope_theta, "layer_rope_theta")
        if self.learned_positions or any(has and not getattr(config, field)[index] for has, field in switches):
            return None
        parameters: Mapping[str, Any] = config.rope_parameters or {}
        if self.rope_by_layer_type:
            parameters = parameters[layer_type(config, index)] or {}
        if self.layer_rope_theta:
            parameters = {**parameters, "rope_theta": config.layer_rope_theta[index]}
        factor = parameters.get("partial_rotary_factor", 1.0) if self.partial_rotary else 1.0
        return RopeSpec(
            rope_type=str(parameters.get("rope_type", "default")),
            theta=float(parameters.get("rope_theta", 10_000.0)),
            rotary_dim=int(head_dim * factor),
            pairing=self.pairing,
            parameters=dict(parameters),
        )


def switched(config: Any, switch: Switch) -> bool:
    """The value of a switch: fixed, or read from the configuration."""
    return switch if isinstance(switch, bool) else bool(getattr(config, switch))


def layer_type(config: Any, index: int) -> str:
    """ "full_attention" or "sliding_attention"."""
    return config.layer_types[index]
