"""LoRA's forward and backward with as few passes over the activations as the formula needs.

peft's own forward casts, scales and adds in passes of their own; on a CPU they cost about as much as LoRA's products.
The modules, their parameters and their checkpoints stay peft's.

Legend: N rows (tokens), I input width, O output width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T with W and b frozen; Hu et al. 2021 (arXiv:2106.09685), eq. 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor, b_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).to(w_OI.dtype)
        a, b = a_RI.to(w_OI.dtype), b_OR.to(w_OI.dtype)
        y_NO = torch.nn.functional.linear(x_NI, w_OI, b_O)
        down_NR = x_NI @ a.T
        y_NO.addmm_(down_NR, b.T, alpha=s)
        ctx.save_for_backward(x_NI, w_OI, a, b, down_NR)
        ctx.s, ctx.shape, ctx.dtypes = s, x.shape, (x.dtype, a_RI.dtype, b_OR.dtype)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_NI, w_OI, a, b, down_NR = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        g_NO = grad.reshape(-1, grad.shape[-1]).to(w_OI.dtype)
        up_NR = (g_NO @ b).mul_(ctx.s)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g_NO @ w_OI).addmm_(up_NR, a).view(ctx.shape).to(x_dtype)
        da = (up_NR.T @ x_NI).to(a_dtype)
        db = (g_NO.T @ down_NR).to(b_dtype).mul_(ctx.s)
        return dx, None, None, da, db, None


def fuse(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear layer of a peft model the fused forward; returns how many.

    Layers with dropout or a LoRA variant, or whose base layer is not a plain frozen linear, keep peft's.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, LoraLinear) and _is_plain(module):
            module.forward = _fused_forward(module)  # type: ignore[method-assign]
            count += 1
    return count


def _fused_forward(module: LoraLinear) -> Any:
    (name,) = module.active_adapters
    base = module.base_layer

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        return _LoraLinear.apply(x, base.weight, base.bias, a, b, module.scaling[name])

    return forward


def _is_plain(module: LoraLinear) -> bool:
    if len(module.active_adapters) != 1 or type(module.base_layer) is not torch.nn.Linear:
        return False
    (name,) = module.active_adapters
    return (
        isinstance(module.lora_dropout[name], torch.nn.Identity)
        and not module.lora_variant
        and not module.lora_bias[name]
        and not module.base_layer.weight.requires_grad
    )
