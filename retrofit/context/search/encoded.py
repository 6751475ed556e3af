"""A loaded model under another rotary encoding, for as long as it is measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from retrofit.context.fields import LAYER_THETAS, as_dict
from retrofit.context.temperature import extended_layers
from retrofit.model.families import describe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def encoded(model: PreTrainedModel, config: PretrainedConfig, query_scale: float = 1.0) -> Iterator[None]:
    """The model with the rotary encoding of another configuration, in every module that computes one.

    query_scale: what scores of extended layers are multiplied with, as if the weights held it (`temperature`).
    """
    if hasattr(config, LAYER_THETAS):
        with _with_thetas(model, config, query_scale):
            yield
        return
    found: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "rope_type") and hasattr(child, "config")
    ]
    assert found, "no rotary embedding"
    try:
        for parent, name, child in found:
            rotary = type(child)(config=config).to(model.device)
            _scale_queries(rotary, query_scale)
            setattr(parent, name, rotary)
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


@contextmanager
def _with_thetas(model: PreTrainedModel, config: PretrainedConfig, query_scale: float) -> Iterator[None]:
    """The same where the model has a module for each base (`rotary_embs`) and looks up its layers' bases."""
    base: Any = next(module for module in model.modules() if hasattr(module, "rotary_embs"))
    before = base.rotary_embs, getattr(base.config, LAYER_THETAS)
    extended = {layer.rope.theta for layer in extended_layers(describe(config), as_dict(config)) if layer.rope}
    rotaries = []
    for theta in sorted({theta for theta in getattr(config, LAYER_THETAS) if theta}):
        of_theta = copy.deepcopy(config)
        of_theta.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
        rotary = type(base.rotary_emb)(config=of_theta).to(model.device)
        _scale_queries(rotary, query_scale if theta in extended else 1.0)
        rotaries.append(rotary)
    try:
        base.rotary_embs = nn.ModuleList(rotaries)
        setattr(base.config, LAYER_THETAS, list(getattr(config, LAYER_THETAS)))
        yield
    finally:
        base.rotary_embs = before[0]
        setattr(base.config, LAYER_THETAS, before[1])


def _scale_queries(rotary: nn.Module, scale: float) -> None:
    """Let `rotary` multiply the scores of extended layers by `scale` more, as `temperature.query_rules` does."""
    names = ("attention_scaling", "full_attention_attention_scaling")
    name = next(name for name in reversed(names) if hasattr(rotary, name))
    setattr(rotary, name, getattr(rotary, name) * scale**0.5)
