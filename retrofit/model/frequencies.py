"""Position encodings whose frequencies depend on the length of a text (`dynamic`, `longrope`), and how to fix them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def varying(config: PreTrainedConfig) -> tuple[str, int] | None:
    """(RoPE type, tokens up to which its frequencies are fixed) where they depend on the length; None otherwise."""
    stored = getattr(config, "rope_parameters", None) or {}
    layers = [stored] if "rope_type" in stored else [entry for entry in stored.values() if isinstance(entry, dict)]
    found = []
    for entry in layers:
        varies = entry.get("rope_type") == "dynamic" or (
            entry.get("rope_type") == "longrope" and entry.get("short_factor") != entry.get("long_factor")
        )
        if varies:
            until = entry.get("original_max_position_embeddings") or config.max_position_embeddings
            found.append((int(until), str(entry["rope_type"])))
    # Of several kinds the shortest bounds them all, and `dynamic` is the one with nothing in common between lengths.
    return (min((kind for _, kind in found)), min(found)[0]) if found else None


@contextmanager
def frequencies_of(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Every position inside the block is encoded as in one pass over `length` tokens.

    `dynamic` and `longrope` choose their frequencies from the highest position of each forward pass, so a text read in
    chunks would get others in its first chunks than in its last. Here they are set once. Nothing happens to a model
    whose frequencies do not depend on the length.
    """
    modules: list[Any] = []
    if varying(model.config):
        modules = [module for module in model.modules() if hasattr(module, "rope_type") and _follows_length(module)]
    types = [module.rope_type for module in modules]
    try:
        for module in modules:
            _at(module, model, 0)  # `dynamic` never shrinks by itself
            _at(module, model, length - 1)
            module.rope_type = (
                "default" if isinstance(module.rope_type, str) else dict.fromkeys(module.rope_type, "default")
            )
        yield
    finally:
        for module, kind in zip(modules, types, strict=True):
            module.rope_type = kind
            _at(module, model, 0)


def _follows_length(module: Any) -> bool:
    kinds = [module.rope_type] if isinstance(module.rope_type, str) else list(module.rope_type.values())
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _at(module: Any, model: PreTrainedModel, position: int) -> None:
    """Let a rotary embedding choose its frequencies for `position`."""
    with torch.inference_mode(False), torch.no_grad():  # what it keeps must serve training too
        x = torch.zeros((1, 1, 1), dtype=model.dtype, device=model.device)
        position_ids = torch.tensor([[position]], device=model.device)
        if isinstance(module.rope_type, str):
            module(x, position_ids)
        else:
            for layer_type in module.rope_type:
                module(x, position_ids, layer_type)
