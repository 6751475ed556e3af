"""The formulas of the papers, and what a model of transformers computes."""

from __future__ import annotations

import math

import numpy as np

from retrofit.context.fields import as_dict, views
from retrofit.recipe.schema import RopeSettings

FACTOR = 4.0
WINDOW = 512
LLAMA31 = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def rotary(model):
    return model.get_decoder().rotary_emb


def computed(model, layer_type):
    """(inverse frequencies, attention factor) that the model computes."""
    module = rotary(model)
    prefix = f"{layer_type}_" if layer_type else ""
    return getattr(module, f"{prefix}inv_freq").double().numpy(), float(getattr(module, f"{prefix}attention_scaling"))


def options(method: str, pairs: int, **over) -> dict:
    """Arguments of `extend`; for longrope equal lists, so that the encoding does not depend on the length."""
    lists = tuple(1.0 + 0.25 * i for i in range(pairs))
    given = {"short_factor": lists, "long_factor": lists} if method == "longrope" else {}
    return {"method": method, "settings": RopeSettings(**{**given, **over})}


def rotary_pairs(config) -> int:
    old = views(as_dict(config))[0].parameters
    dim = int(config.head_dim if getattr(config, "head_dim", None) else 16)
    return int(dim * (old.get("partial_rotary_factor") or 1.0)) // 2


def plain(theta: float, dim: int) -> np.ndarray:
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def by_hand(method: str, theta: float, dim: int, s: float, length: int) -> tuple[np.ndarray, float]:
    """The papers' formulas, pair by pair."""
    base = plain(theta, dim)
    if method == "none":
        return base, 1.0
    if method == "longrope":
        lists = np.array([1.0 + 0.25 * i for i in range(dim // 2)])
        return base / lists, math.sqrt(1 + math.log(s) / math.log(length))
    if method == "linear":
        return base / s, 1.0
    if method == "ntk":
        return plain(theta * s ** (dim / (dim - 2)), dim), 1.0
    out = []
    if method == "llama3":
        for f in base:
            wavelength = 2 * math.pi / f
            if wavelength < length / 4:
                out.append(f)
            elif wavelength > length:
                out.append(f / s)
            else:
                smooth = (length / wavelength - 1) / (4 - 1)
                out.append((1 - smooth) * f / s + smooth * f)
        return np.array(out), 1.0
    low = max(math.floor(dim * math.log(length / (32 * 2 * math.pi)) / (2 * math.log(theta))), 0)
    high = min(math.ceil(dim * math.log(length / (2 * math.pi)) / (2 * math.log(theta))), dim - 1)
    for i, f in enumerate(base):
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append((1 - ramp) * f + ramp * f / s)
    return np.array(out), 0.1 * math.log(s) + 1


def tiny_model_from(config):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    return _with_rotary(shell, config)


def _with_rotary(shell, config):
    """Only the rotary module is built for real: its buffers are all that is looked at."""
    decoder = shell.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    return shell
