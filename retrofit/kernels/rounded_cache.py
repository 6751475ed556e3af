"""Attention that reads keys and values as a serving engine's KV cache of fewer bits gives them back.

Both engines write the tokens of a pass into the cache before attention reads it, so that every key (after RoPE) and
value that any query sees has been through the cache, those of the current chunk too. `round_cache` does the same in
one place: what a layer hands to its cache is stored and read back on the way, whichever cache, chunk or kernel there
is. Values come back in the model's dtype: in bfloat16 those of int8, q8_0 and q4_0 are rounded once more.

Not part of it: vLLM's flash attention and llama.cpp on a CPU round queries as well while they multiply.

Legend: D head dim, N blocks of a head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrofit.model.cache_dtype import AUTO, CACHE_DTYPES, PAIRED
from retrofit.model.families import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHE_ARGUMENTS = ("past_key_values", "layer_past")
_ROTATED = 64  # llama.cpp rotates heads whose dim is a multiple of it


def round_cache(model: PreTrainedModel, cache_dtype: str) -> None:
    """Have every attention layer of `model` read its keys and values through a cache of this type, from now on.

    With a transformers cache, a chunk at a time or without any cache: rounded are the keys and values of the tokens
    that a pass reads, before they are kept. "auto" changes nothing.
    """
    if cache_dtype == AUTO:
        return
    spec = describe(model.config)
    layers: Any = model.get_submodule(spec.layers_path)
    for index in range(len(spec.layers)):
        attention = layers[index].get_submodule(spec.attention_path)
        parameters = inspect.signature(attention.forward).parameters
        [name] = [name for name in _CACHE_ARGUMENTS if name in parameters]
        through = functools.partial(_through, name, cache_dtype, spec.family in PAIRED)
        attention.register_forward_pre_hook(through, with_kwargs=True)


def _through(
    name: str, cache_dtype: str, paired: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, name: _Rounding(kwargs.get(name), cache_dtype, paired)}


class _Rounding:
    """Stands for the cache that a layer is given, or for none."""

    def __init__(self, cache: Any, cache_dtype: str, paired: bool) -> None:
        self._cache, self._dtype, self._paired = cache, cache_dtype, paired

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = stored_keys(keys, self._dtype, self._paired), stored_values(values, self._dtype)
        if self._cache is None:
            return rounded
        found: tuple[Tensor, Tensor] = self._cache.update(*rounded, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def stored_keys(keys: Tensor, cache_dtype: str, paired: bool) -> Tensor:
    """Keys [..., D] as the cache gives them back, in their own dtype. paired: llama.cpp has rotary pairs side by side,
    so that its blocks hold dims 0, D/2, 1, D/2 + 1, ..."""
    rotation = _largest_rotation(keys.shape[-1])
    if not paired or CACHE_DTYPES[cache_dtype].block is None:
        return _stored(keys, cache_dtype, rotation)
    pairs = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return _stored(pairs, cache_dtype, rotation).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def stored_values(values: Tensor, cache_dtype: str) -> Tensor:
    """Values [..., D] as the cache gives them back, in their own dtype."""
    return _stored(values, cache_dtype, _ROTATED)


def _stored(states: Tensor, cache_dtype: str, rotation: int) -> Tensor:
    """rotation: width of the Hadamard matrix that llama.cpp stores its types under, since April 2026 (pull request
    21038), where 64 divides the head dim; queries and outputs are rotated with it, so that only rounding differs."""
    wide = states.float()
    if CACHE_DTYPES[cache_dtype].block is None or states.shape[-1] % _ROTATED:
        return ROUNDED[cache_dtype](wide).to(states.dtype)
    matrix = hadamard(rotation, states.device)
    rotated = (wide.unflatten(-1, (-1, rotation)) @ matrix).flatten(-2)
    return (ROUNDED[cache_dtype](rotated).unflatten(-1, (-1, rotation)) @ matrix).flatten(-2).to(states.dtype)


def _largest_rotation(head_dim: int) -> int:
    """The largest power of two, 64 at least, that divides the head dim; values take 64 always."""
    width = _ROTATED
    while head_dim % (2 * width) == 0:
        width *= 2
    return width


@functools.cache
def hadamard(width: int, device: torch.device) -> Tensor:
    """The orthonormal symmetric Walsh-Hadamard matrix [width, width], float32; width: a power of two."""
    found = torch.ones(1, 1)
    while len(found) < width:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return (found * width**-0.5).to(device)


def fp8_e4m3(states: Tensor) -> Tensor:
    """Values float32 after a cast to float8 e4m3 that saturates: vLLM's scale for keys and values of 1.0."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return states.clamp(-most, most).to(torch.float8_e4m3fn).float()


def int8(states: Tensor) -> Tensor:
    """Heads float32 [..., D] as int8 with a float32 scale each: vLLM's `int8_per_token_head`.

    The largest magnitude becomes 127; halves are rounded away from zero.
    """
    scale = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
    codes = states * (1.0 / scale)
    return torch.trunc(codes + torch.where(codes >= 0, 0.5, -0.5)).clamp(-128, 127) * scale


def q8_0(states: Tensor) -> Tensor:
    """Heads float32 [..., D] in ggml's blocks of 32: int8 codes, a float16 scale that makes the largest 127."""
    blocks = states.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = blocks * _inverse(scale)
    floor = codes.abs().floor()
    codes = codes.sign() * (floor + (2 * (codes.abs() - floor)).floor())  # halves away from zero
    return (codes * scale.half().float()).flatten(-2)


def q4_0(states: Tensor) -> Tensor:
    """Heads float32 [..., D] in ggml's blocks of 32: codes -8 to 7, a float16 scale that makes the largest -8."""
    blocks = states.unflatten(-1, (-1, 32))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = torch.trunc(blocks * _inverse(scale) + 8.5).clamp(0, 15) - 8
    return (codes * scale.half().float()).flatten(-2)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 of a block of zeros."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


ROUNDED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "fp8_e4m3": fp8_e4m3,
    "int8": int8,
    "q8_0": q8_0,
    "q4_0": q4_0,
}
"""Heads float32 [..., D] as they are read from a cache of each type, without llama.cpp's rotation."""
