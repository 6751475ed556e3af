"""torch's context parallelism on a CPU: its own ring over PyTorch's flash op for CPUs, which it has no rule for."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def on_cpu() -> None:
    """Let torch's context parallelism run on CPU tensors of this process."""
    DTensor._op_dispatcher._custom_op_handlers |= {FORWARD: _forward, BACKWARD: _backward}


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    query, key, value, *rest = args
    causal = rest[1] if len(rest) > 1 else kwargs.get("is_causal", False)
    out, lse = _attention._templated_ring_attention(
        query.device_mesh.get_group(),
        2,
        FORWARD,
        query=query.to_local(),
        key=key.to_local(),
        value=value.to_local(),
        is_causal=causal,
        scale=kwargs.get("scale"),
    )
    return _wrapped((out, lse), query)


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grad, query, key, value, out, lse, dropout, causal = args
    found = _attention._templated_ring_attention_backward(
        query.device_mesh.get_group(),
        2,
        BACKWARD,
        grad_out=grad.to_local(),
        grad_out_name="grad_out",
        query=query.to_local(),
        key=key.to_local(),
        value=value.to_local(),
        out=out.to_local(),
        logsumexp=lse.to_local(),
        is_causal=causal,
        dropout_p=dropout,
        scale=kwargs.get("scale"),
    )
    return _wrapped(found, query)


def _wrapped(tensors: tuple[Any, ...], like: DTensor) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(one, like.device_mesh, [Shard(2)], run_check=False) for one in tensors)
