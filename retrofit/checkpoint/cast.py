"""Casts that are refused where they would make infinities."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.errors import UserError


def fits(low: Tensor, high: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values from `low` to `high` stay finite in `dtype`."""
    return bool(torch.isfinite(torch.stack([low, high]).to(dtype)).all())


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A floating tensor in `dtype`, others as they are. Raises UserError where a value is beyond its range."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and tensor.numel() and not fits(*torch.aminmax(tensor), dtype):
        raise beyond(name, dtype)
    return tensor.to(dtype)


def beyond(name: str, dtype: torch.dtype, where: str | None = None) -> UserError:
    """Of a tensor that has values which `dtype` cannot hold."""
    return UserError(
        f"`{name}` has values beyond the largest {_name(dtype)} ({torch.finfo(dtype).max:g})",
        where=where or f"dtype: {_name(dtype)}",
        fix="write bfloat16 or float32 instead (`--dtype`, `dtype:` of a recipe)",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
