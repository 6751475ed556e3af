"""A GPU that is none: tensors that say they are on cuda:0, compute on the CPU, and are not mixed with those of the CPU.

For code that has to put everything where it computes. What a real one computes differently, and CUDA's own functions
beyond the few below, stay untested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "cuda:0"
_GPU = torch.device(NAME)
_aten: Any = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)  # by indices of either device


class OnGpu(Tensor):
    """A tensor whose values are those of `held`, on the CPU."""

    held: Tensor
    device = property(lambda self: _GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> OnGpu:
        held = held.held if isinstance(held, OnGpu) else held
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cpu"),  # for torch's own code, which is not made for another one here
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.cpu, Tensor.to) and isinstance(args[0], OnGpu):
            with torch._C.DisableTorchFunctionSubclass():
                return _moved(args[0], ["cpu"] if func is Tensor.cpu else [*args[1:], *kwargs.values()], kwargs)
        if func is Tensor.tolist:
            return args[0].held.tolist()
        if func is Tensor.numpy:
            raise TypeError(f"can't convert {NAME} device type tensor to numpy")
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _moved(tensor: OnGpu, wanted: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What `tensor.to(...)` gives. wanted: its arguments."""
    tensors = [one for one in wanted if isinstance(one, Tensor)]
    dtype = next((one for one in [*wanted, *(one.dtype for one in tensors)] if isinstance(one, torch.dtype)), None)
    devices = [one for one in [*wanted, *(one.device for one in tensors)] if isinstance(one, str | torch.device)]
    result: Any = tensor
    if (dtype is not None and dtype != tensor.dtype) or kwargs.get("copy"):
        result = _aten._to_copy(tensor, dtype=dtype)
    return result.held.clone() if devices and torch.device(devices[0]).type == "cpu" else result


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on what the tensors hold; its results are where they would be."""

    def held(value: Any) -> Any:
        return value.held if isinstance(value, OnGpu) else value

    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    ours = {id(one.held): one for one in tensors if isinstance(one, OnGpu)}
    inner, device = tree_map(held, kwargs), kwargs.get("device")
    if device is not None:
        inner["device"] = torch.device("cpu")
    if func is _aten.copy_.default:
        func(*tree_map(held, args), **inner)
        return args[0]
    others = [one for one in tensors if not isinstance(one, OnGpu) and one.dim() and func not in _INDEXED]
    if ours and others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} with {tuple(others[0].shape)} on the CPU"
        )
    # A lazily conjugated tensor is told by a mark that operations do not see here.
    done = (_aten.conj_physical.default if func is _aten._conj.default else func)(*tree_map(held, args), **inner)
    there = bool(ours) or (device is not None and torch.device(device).type == "cuda")

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not there:
            return value
        return ours[id(value)] if id(value) in ours else OnGpu(value)

    return tree_map(placed, done)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if there or any(isinstance(one, OnGpu) for one in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *, memory: int = 1 << 34) -> Iterator[str]:
    """In the block there is a device cuda:0 with `memory` bytes; gives its name."""
    autocast: Callable[..., Any] = torch.autocast
    tensor: Callable[..., Any] = torch.tensor

    def tensor_on(values: Any, *, device: Any = None, **how: Any) -> Tensor:
        made: Tensor = tensor(values, **how)  # it makes its own on a real device only
        return made if device is None else made.to(device)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr("retrofit.system.device.total_memory", lambda device: memory)
        patch.setattr(
            torch,
            "autocast",
            lambda kind, *args, **how: nullcontext() if kind == "cuda" else autocast(kind, *args, **how),
        )
        patch.setattr(torch, "tensor", tensor_on)
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # by `Module.to`, which would keep theirs
        try:
            with _Mode():
                yield NAME
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
