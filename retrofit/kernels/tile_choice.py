"""Which back end computes the tiles of `blockwise` on a GPU: the fastest of those that are right there.

A choice is made once for a device, dtype, head dim and numbers of heads. Each back end that this card and these
packages have runs small tiles, which have to agree with attention written out in fp32, forward and backward; of those
that do, the fastest on a prefill is taken. Where two are within a tenth of each other it is the earlier in `BACKENDS`,
so that a choice repeats.

Legend: B batch, H query heads, K KV heads (H = s K), T queries, S keys, D head dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels.tile_backends import BACKENDS, FLASH, Card, TileBackend

FEW_QUERIES = 64
"""Tiles with fewer queries go to PyTorch's FlashAttention 2, which divides the keys among the processors. cuDNN up to
9.27 gives wrong log-sum-exps or gradients for a single query (NVIDIA/cudnn-frontend, issues 1072 and 1083)."""


@dataclass(frozen=True)
class Shape:
    """What is chosen for."""

    dtype: torch.dtype
    head_dim: int
    query_heads: int
    kv_heads: int


@dataclass(frozen=True)
class TileChoice:
    """The back ends of a shape. backend: of most tiles, few: of those with fewer than FEW_QUERIES queries. reason: what
    was tried and how fast it was."""

    backend: TileBackend
    few: TileBackend
    reason: str
    processors: int

    def for_tile(self, queries: int, keys: int) -> TileBackend:
        """The back end of a tile."""
        return self.backend if queries >= FEW_QUERIES and keys > 1 else self.few

    def parts(self, batch: int, heads: int, queries: int, keys: int) -> int:
        """Runs of keys that a full tile is cut into so that every processor has work: 1 where there are queries enough
        (a processor takes 128 of one head at a time), or where the back end does it by itself."""
        if self.for_tile(queries, keys).splits_keys:
            return 1
        blocks = batch * heads * math.ceil(queries / 128)
        return max(1, min(math.ceil(2 * self.processors / blocks), keys // 1024))


@dataclass(frozen=True)
class Trial:
    """error: largest relative error of out, lse and the gradients. seconds: of a prefill, forward and backward."""

    error: float
    seconds: float


TOLERANCE = 0.03  # relative; rounding to bfloat16 gives 0.004 to 0.01
_FASTER = 0.9
_FAILURES = (ImportError, RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError, AttributeError)


def select(
    card: Card,
    shape: Shape,
    attempt: Callable[[TileBackend, Shape], Trial],
    *,
    installed: Callable[[str], bool],
    backends: Sequence[TileBackend] = BACKENDS,
) -> TileChoice:
    """The fastest of the back ends that are right on this card.

    attempt: runs one of them; what it raises counts as a failure of that back end, and is part of the reason.

    Raises: UserError where none is right, with what is wrong with each.
    """
    right: list[tuple[TileBackend, Trial]] = []
    wrong: list[str] = []
    for backend in backends:
        objection = backend.missing(installed) or backend.unsupported(card, shape.dtype, shape.head_dim)
        if objection is None:
            try:
                trial = attempt(backend, shape)
            except _FAILURES as error:
                objection = f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            else:
                if trial.error <= TOLERANCE:  # false for NaN
                    right.append((backend, trial))
                    continue
                objection = f"its results are wrong by {trial.error:.2g} of their size"
        wrong.append(f"{backend.name}: {objection}")
    if not right:
        dtype = str(shape.dtype).removeprefix("torch.")
        raise UserError(
            f"no attention kernel with a log-sum-exp for {dtype} and head dim {shape.head_dim} on {card.name}: "
            + "; ".join(wrong),
            where="kernel: blockwise",
            fix="load the model in bfloat16, or use kernel: sdpa",
        )
    best, fastest = right[0]
    for backend, trial in right[1:]:
        if trial.seconds < _FASTER * fastest.seconds:
            best, fastest = backend, trial
    few = next((backend for backend, _ in right if backend is FLASH), best)
    times = ", ".join(f"{backend.name} {trial.seconds * 1e3:.3g} ms" for backend, trial in right)
    reason = f"tiles by {best.name} ({times} for a prefill and its gradients"
    reason += f"; {'; '.join(wrong)})" if wrong else ")"
    return TileChoice(best, few, reason, card.processors)


@lru_cache(maxsize=64)
def chosen(device: torch.device, shape: Shape) -> TileChoice:
    """The choice for a CUDA device, made at the first call and kept. Raises UserError as `select`."""
    return select(card_of(device), shape, lambda backend, shape: run_trial(backend, shape, device), installed=installed)


def choice_for(q_BHTD: Tensor, k_BKSD: Tensor) -> TileChoice:
    """The choice for these tensors."""
    return chosen(q_BHTD.device, Shape(q_BHTD.dtype, q_BHTD.shape[3], q_BHTD.shape[1], k_BKSD.shape[1]))


def card_of(device: torch.device) -> Card:
    """The card that torch sees."""
    properties = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return Card(properties.name, (properties.major, properties.minor), cudnn, int(properties.multi_processor_count))


def installed(package: str) -> bool:
    """Whether a package of that name is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- trying one


def run_trial(backend: TileBackend, shape: Shape, device: torch.device, tokens: int = 8192) -> Trial:
    """How wrong a back end is on small tiles, and how long a prefill of `tokens` takes it."""
    error = 0.0
    for queries, keys, causal in ((192, 192, True), (130, 320, False)):
        q, k, v, grad = _random(shape, queries, keys, device)
        scale = shape.head_dim**-0.5
        out, lse = backend.forward(q, k, v, causal, scale)
        found = (out, lse, *backend.backward(grad, q, k, v, out, lse, causal, scale))
        wanted = plain(q, k, v, grad, causal, scale)
        # Through torch, whose maximum with a NaN is NaN.
        error = float(
            torch.stack([torch.tensor(error), *(_relative(a, b) for a, b in zip(found, wanted, strict=True))]).max()
        )
    q, k, v, grad = _random(shape, tokens, tokens, device)
    seconds = math.inf
    for _ in range(4):  # the first compiles and loads
        began = _now(device)
        out, lse = backend.forward(q, k, v, True, scale)
        backend.backward(grad, q, k, v, out, lse, True, scale)
        seconds = min(seconds, _now(device) - began)
    return Trial(error, seconds)


def plain(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of one tile, written out in fp32: Dao et al. 2022, FlashAttention, appendix B.2."""
    groups = q.shape[1] // k.shape[1]
    q, k, v, grad = (
        q.float(),
        k.float().repeat_interleave(groups, 1),
        v.float().repeat_interleave(groups, 1),
        grad.float(),
    )
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse[..., None])
    out = p @ v
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (ds.mT @ q, p.mT @ grad))
    return out, lse, ds @ k, dk, dv


def _random(shape: Shape, queries: int, keys: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(queries)
    sizes = [(shape.query_heads, queries), (shape.kv_heads, keys), (shape.kv_heads, keys), (shape.query_heads, queries)]
    return tuple(
        torch.randn((1, heads, tokens, shape.head_dim), generator=generator, device=device).to(shape.dtype)
        for heads, tokens in sizes
    )


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return ((found.float() - wanted).norm() / wanted.norm()).cpu()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
