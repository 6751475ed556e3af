"""Checkpoints of a training: its weights and the optimizer's state as whole tensors, whatever number of processes.

So a training that stopped on two processes is resumed by one, or by three with the weights split over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from retrofit.recovery.adapters import trainable

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def save_weights(model: nn.Module, folder: Path, *, main: bool) -> None:
    """Write what is trained into `folder`, by the main process; all of them have to call it."""
    weights = trainable(model, keep=main)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights that `save_weights` wrote into the model, each process its part."""
    put_weights(model, load_file(folder / WEIGHTS))


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole tensors, as `trainable` gives them, into the model, each process its part."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(_as(weights[name], parameter))


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, main: bool) -> None:
    """Write the optimizer's state into `folder`, by the main process; all of them have to call it."""
    state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if main:
        torch.save(state, folder / OPTIMIZER)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Put the state that `save_optimizer` wrote into the optimizer, each process its part."""
    state: Any = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)


def _as(value: Tensor, like: Tensor) -> Tensor:
    """The tensor laid out over processes as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
