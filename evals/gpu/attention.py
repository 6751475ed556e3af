"""Attention kernels on this device: tile back ends and `blockwise` against fp64, then their speed beside sdpa's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evals.gpu.parts import Row, Setting
from retrofit.kernels import blockwise
from retrofit.kernels.tile_backends import BACKENDS
from retrofit.kernels.tile_choice import TOLERANCE, Shape, card_of, choice_for, installed, run_trial
from retrofit.system.speed import synchronize

# (queries, keys, window): prefill, cached chunk, one token, windows shorter and longer than a chunk
CASES = ((96, 96, None), (64, 320, None), (1, 257, None), (200, 200, 33), (64, 320, 100), (65, 257, 1), (130, 130, 500))
HEADS = ((9, 3), (9, 1), (8, 8), (32, 8))
LIMITS = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}  # largest relative error


def correct(setting: Setting) -> Iterator[Row]:
    """Tile back ends, and `blockwise` forward and backward, against attention written out in fp64."""
    cuda = setting.device.startswith("cuda")
    if cuda:
        yield from _backends(torch.device(setting.device))
    dtypes = (torch.bfloat16, torch.float16) if cuda else (torch.float32,)
    dims = (16,) if setting.reduced else (64, 128, 256)
    heads = HEADS[:2] if setting.reduced else HEADS
    for dtype in dtypes:
        worst, wrong, count = 0.0, [], 0
        for (queries, keys, window), (h, k), dim, sinks in itertools.product(CASES, heads, dims, (False, True)):
            error = _error(setting.device, dtype, h, k, dim, queries, keys, window, sinks)
            count += 1
            worst = max(worst, error)
            if not error <= LIMITS[dtype]:
                more = ", sinks" if sinks else ""
                wrong.append(f"{queries} of {keys}, window {window}, heads {h}/{k} of {dim}{more}: {error:.2g}")
        name = str(dtype).removeprefix("torch.")
        note = "; ".join(wrong[:3]) or f"{count} shapes, forward and backward, half of them with attention sinks"
        yield Row(f"blockwise against fp64, {name}", worst, "relative error", passed=not wrong, note=note)


def _backends(device: torch.device) -> Iterator[Row]:
    shape = Shape(torch.bfloat16, 128, 32, 8)
    for backend in BACKENDS:
        reason = backend.missing(installed) or backend.unsupported(card_of(device), shape.dtype, shape.head_dim)
        if reason is not None:
            yield Row(f"tiles by {backend.name}", "not here", note=reason)
            continue
        trial = run_trial(backend, shape, device)
        what = f"tiles by {backend.name} against fp32"
        yield Row(what, trial.error, "relative error", passed=trial.error <= TOLERANCE)


def _error(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    queries: int,
    keys: int,
    window: int | None,
    sinks: bool,
) -> float:
    """Largest relative error of the output and of every gradient; of one that has to be nothing, its size."""
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    q, k, v, grad = (torch.randn(1, h, n, dim, generator=generator).to(device, dtype) for h, n in sizes)
    given = (q, k, v, torch.randn(heads, generator=generator).to(device)) if sinks else (q, k, v)
    found = _with_gradients(lambda a, b, c, *s: blockwise.attention(a, b, c, dim**-0.5, window, *s), grad, *given)
    plain = partial(reference, window=window)
    wanted = _with_gradients(plain, *(x.double() for x in (grad, *given)))
    return max(
        float((a.double() - b).norm() / b.norm().clamp_min(0.01 * b.numel() ** 0.5))
        for a, b in zip(found, wanted, strict=True)
    )


def reference(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None = None, *, window: int | None) -> Tensor:
    """Causal attention of the last T of S positions with a mask, as the formula has it; sinks are one more column."""
    queries, keys = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at = torch.arange(keys - queries, keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)
    visible = (key <= at) & (key > at - (window or keys))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(scores, -1)[..., :keys] @ v


def _with_gradients(attention: Callable[..., Tensor], grad: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def speed(setting: Setting) -> Iterator[Row]:
    """TFLOP/s of `blockwise` and of sdpa, causal, 32 heads of 128, and the last tokens of a long text."""
    cuda = setting.device.startswith("cuda")
    heads, dim = (32, 128) if cuda else (4, 32)
    lengths = (8192, 32768, 131072) if not setting.reduced else (512,)
    dtype = torch.bfloat16 if cuda else torch.float32
    kernels = {"sdpa": _sdpa, "blockwise": lambda a, b, c: blockwise.attention(a, b, c, dim**-0.5)}
    for length in lengths:
        q, k, v = (torch.randn(1, heads, length, dim, device=setting.device, dtype=dtype) for _ in range(3))
        flops = 2 * heads * dim * float(length) ** 2  # half of 4 H D T^2
        forward, both = {}, {}
        for name, kernel in kernels.items():
            forward[name] = flops / _seconds(partial(_forward, kernel, q, k, v), setting.device)
            both[name] = 3.5 * flops / _seconds(partial(_with_gradients, kernel, q, q, k, v), setting.device)
        for direction, rates in (("forward", forward), ("forward and backward", both)):
            share = rates["blockwise"] / rates["sdpa"]
            for name, rate in rates.items():
                passed = share >= 0.9 if name == "blockwise" and cuda else None
                note = f"{share:.2f} of sdpa; aim 0.9" if name == "blockwise" else ""
                yield Row(f"{name}, {direction}, {length:,} tokens", rate / 1e12, "TFLOP/s", passed=passed, note=note)
        if cuda and length == lengths[0]:
            yield Row("tiles chosen", choice_for(q, k).backend.name, note=choice_for(q, k).reason)
    longest, last = lengths[-1], min(512, lengths[-1] // 2)
    q, k, v = (torch.randn(1, heads, n, dim, device=setting.device, dtype=dtype) for n in (last, longest, longest))
    seconds = _seconds(partial(_forward, kernels["blockwise"], q, k, v), setting.device)
    flops = 4.0 * heads * dim * (last * (longest - last) + last * last / 2)
    yield Row(f"blockwise, last {last} of {longest:,} tokens", flops / seconds / 1e12, "TFLOP/s")
    for kv_heads in dict.fromkeys((heads, heads // 4, 1)):
        q1 = torch.randn(1, heads, 1, dim, device=setting.device, dtype=dtype)
        k1, v1 = (x[:, :kv_heads].contiguous() for x in (k, v))
        taken = _seconds(partial(_forward, kernels["blockwise"], q1, k1, v1), setting.device)
        yield Row(f"one query of {longest:,} tokens, {kv_heads} KV heads", taken * 1e6, "us")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@torch.no_grad()
def _forward(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernel(q, k, v)


def _seconds(work: Callable[[], object], device: str, rounds: int = 3) -> float:
    """The fastest of a few, after one that is not counted."""
    best = float("inf")
    for round_ in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if round_:
            best = min(best, time.perf_counter() - began)
    return best
