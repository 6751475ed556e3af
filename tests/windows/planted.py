"""A model of four layers, built by hand, that finds what a token was followed by before: two heads in two layers.

    layer 1   each token looks at the one before it and notes which that is
    layer 2   looks at all tokens alike, and what it gives is read by nothing
    layer 3   each token looks for the one that noted it, however far back, and the head predicts that one again

Layers 0 and 2 do nothing that matters. Layer 1 looks back one token. A window in layer 3 hides what it has to find.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from tests.tiny import VOCAB_SIZE, tiny_config, tiny_tokenizer

WIDTH, HEAD, THETA = 128, 64, 1e6
PAIRS = torch.arange(14, 32)  # that turn little over a few hundred tokens
CODE = torch.cat([PAIRS, PAIRS + HEAD // 2])  # where a head compares tokens
SIZE = len(CODE)
TOKEN, BEFORE, FOUND = (slice(start * SIZE, (start + 1) * SIZE) for start in range(3))
RETRIEVES = 3
LAYERS = 4


def save_planted(folder: Path) -> Path:
    """Write the model with a tokenizer of bytes."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(
        "qwen2",
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=LAYERS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    codes = torch.randn(VOCAB_SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    codes = codes / codes.norm(dim=1, keepdim=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, TOKEN] = codes
        model.lm_head.weight[:, FOUND] = 2 * codes
        looks_back(model.model.layers[1].self_attn)
        looks_around(model.model.layers[2].self_attn)
        looks_for(model.model.layers[RETRIEVES].self_attn)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def looks_back(attention: torch.nn.Module) -> None:
    """The score of a head without content is a sum of cos(theta_i (distance - 1))."""
    pairs, strength = torch.arange(9), 12.0
    angles = THETA ** (-2 * pairs / HEAD)
    attention.k_proj.bias[pairs] = strength
    attention.q_proj.bias[pairs] = strength * torch.cos(angles)
    attention.q_proj.bias[pairs + HEAD // 2] = -strength * torch.sin(angles)
    copies(attention, TOKEN, BEFORE, scale=1 / math.sqrt(WIDTH))


def looks_around(attention: torch.nn.Module) -> None:
    """Scores of zero, and values that are written where nothing reads them."""
    attention.v_proj.weight[:SIZE, TOKEN] = torch.eye(SIZE)
    attention.o_proj.weight[WIDTH - 4 :, :4] = 0.1 * torch.eye(4)


def looks_for(attention: torch.nn.Module) -> None:
    """Queries are tokens, keys are what tokens noted, values are tokens."""
    strength = 2.6 * torch.eye(SIZE)
    attention.q_proj.weight[CODE, TOKEN] = strength
    attention.k_proj.weight[CODE, BEFORE] = strength
    copies(attention, TOKEN, FOUND, scale=math.sqrt(2 / WIDTH))


def copies(attention: torch.nn.Module, start: slice, to: slice, *, scale: float) -> None:
    """The head's values are what stands at `start`; they are written to `to`."""
    attention.v_proj.weight[:SIZE, start] = torch.eye(SIZE)
    attention.o_proj.weight[to, :SIZE] = scale * torch.eye(SIZE)


def random_text(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Bytes that follow each other at random, [rows, tokens]."""
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))
