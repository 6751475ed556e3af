"""What running a model costs: decode speed and the bytes its KV cache really holds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from retrofit.errors import UserError


@dataclass(frozen=True)
class DecodeCost:
    """tokens_per_s: median over `runs` greedy decodes of `decode_tokens`, each after a prompt of `prompt_tokens`.

    kv_bytes: what the cache held at the end, kv_tokens tokens long. kernel, dtype: what was measured.
    """

    tokens_per_s: float
    runs: tuple[float, ...]
    prompt_tokens: int
    decode_tokens: int
    kv_bytes: int
    kv_tokens: int
    kernel: str
    dtype: str

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes per token of the measured cache; below the formula where a sliding window has cut it."""
        return self.kv_bytes / self.kv_tokens


def decode_speed(
    model: PreTrainedModel, prompt_tokens: int = 256, decode_tokens: int = 64, *, repeats: int = 3, seed: int = 0
) -> DecodeCost:
    """Greedy decoding, one sequence, with the model's own kernel and a stock cache; random prompt, end tokens ignored.

    The first decoded token comes from the prompt's pass and is not timed.

    Raises: UserError when no token is asked for.
    """
    if decode_tokens < 1 or prompt_tokens < 1:
        raise UserError("decoding needs at least one prompt token and one token to decode", fix="set decode_tokens: 16")
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    speeds = []
    with torch.inference_mode():
        for _ in range(repeats):
            cache = DynamicCache(config=model.config)
            token = _next(model, prompt, cache)
            _wait(model)
            start = time.perf_counter()
            for _ in range(decode_tokens):
                token = _next(model, token, cache)
            _wait(model)
            speeds.append(decode_tokens / (time.perf_counter() - start))
    return DecodeCost(
        tokens_per_s=statistics.median(speeds),
        runs=tuple(speeds),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        kv_bytes=cache_bytes(cache),
        kv_tokens=prompt_tokens + decode_tokens,
        kernel=str(model.config._attn_implementation),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values a transformers cache holds."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)


def _next(model: PreTrainedModel, ids_1T: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    logits = model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
