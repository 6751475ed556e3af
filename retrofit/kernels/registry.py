"""The one door to attention kernels: which there are, which one a model gets and why, and proof that it is right."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.errors import UserError
from retrofit.install import install_command
from retrofit.model.spec import AttentionSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "blockwise")
# `products` is not among them: it cannot be asked for, as it serves nothing but the training that "auto" gives it to.

_HALF = ("float16", "bfloat16")

COMPILES = "PyTorch compiles it first, half a minute of a core for each of: a first chunk, later chunks, single tokens"
"""What `flex_attention` does on a CPU, for people who wait for it."""

# Largest |logit difference| to eager that rounding explains, over some 10^7 logits. In bfloat16 PyTorch's own sdpa
# differs by 1.3 (SmolLM2-135M, 768 tokens), so prove in float32 wherever the kernel has it.
TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "float16": 0.3, "bfloat16": 2.5}


@dataclass(frozen=True)
class KernelStatus:
    """Whether this machine can run a kernel; `install` is what to type when something is missing."""

    name: str
    available: bool
    reason: str
    install: str | None = None


@dataclass(frozen=True)
class KernelChoice:
    """The kernel that `requested` became, and why."""

    requested: str
    name: str
    reason: str


@dataclass(frozen=True)
class KernelCheck:
    """Largest |logit difference| between kernel and `reference`, over one forward pass and a cached continuation.

    tiles: which back end computes the tiles of `blockwise`, and why; None where there is no choice.
    """

    kernel: str
    reference: str
    max_difference: float
    tolerance: float
    tokens: int
    passed: bool
    tiles: str | None = None


def available() -> list[KernelStatus]:
    """Every kernel on this machine, for `retrofit doctor`."""
    import torch

    cuda = torch.cuda.is_available()
    return [
        KernelStatus("eager", True, "plain PyTorch, tokens x tokens memory"),
        KernelStatus("sdpa", True, "PyTorch's scaled_dot_product_attention"),
        _flash_status("flash_attention_2", "flash_attn", install_command("flash-attn", "--no-build-isolation"), cuda),
        _flash_status(
            "flash_attention_3", "flash_attn_interface", "build `hopper/` of Dao-AILab/flash-attention", cuda
        ),
        _flex_status(cuda),
        KernelStatus("blockwise", True, "ours over the flash op of PyTorch, CPU and CUDA (CUDA: half precision only)"),
        KernelStatus("products", True, "ours, for training on a CPU in bfloat16; `auto` takes it, for nothing else"),
    ]


def choose(
    kernel: str, spec: AttentionSpec, device: str, *, training: bool = False, dtype: str | None = None
) -> KernelChoice:
    """The kernel for a model. device: "cpu" or "cuda[:n]". dtype: of the weights, where known ("bfloat16", ...).

    training: forward and backward over whole sequences without padding and without a cache.

    Raises: UserError for an unknown name, a kernel this machine lacks, or one that cannot express this attention.
    """
    if kernel == "auto":
        return _automatic(spec, device, training, dtype)
    if kernel not in KERNELS:
        raise UserError(f"`{kernel}` is not a kernel", where="kernel", fix=f"choose one of auto, {', '.join(KERNELS)}")
    objection = _objection(kernel, spec, device, training, dtype)
    if objection:
        instead = _automatic(spec, device, training, dtype).name
        raise UserError(
            f"kernel `{kernel}` cannot run this model: {objection}",
            where=f"kernel, for {spec.family} on {device}",
            fix=f"use kernel: {instead}, or auto" if instead in KERNELS else "use kernel: auto",
        )
    compiles = kernel == "flex_attention" and not device.startswith("cuda")
    return KernelChoice(kernel, kernel, f"asked for; {COMPILES}" if compiles else "asked for")


def split_kernel(kernel: str, spec: AttentionSpec, device: str, dtype: str | None = None) -> KernelChoice:
    """The kernel of a model whose sequences are shared out over ranks: `ring`, whose tiles are those of `blockwise`.

    Raises: UserError for a kernel that works on whole sequences only, or attention that the tiles cannot express.
    """
    if kernel not in ("auto", "blockwise", "ring"):
        raise UserError(
            f"kernel `{kernel}` cannot share one sequence over several ranks",
            where="kernel",
            fix="use kernel: auto, or one rank for each sequence",
        )
    objection = _objection("blockwise", spec, device, True, dtype)
    if objection:
        raise UserError(
            f"one sequence cannot be shared over several ranks: {objection}",
            where=f"attention of {spec.family} on {device}",
            fix="use one rank for each sequence",
        )
    return KernelChoice(kernel, "ring", "one sequence over several ranks")


def apply(model: PreTrainedModel, choice: KernelChoice) -> None:
    """Set the model's attention implementation, made known to transformers where it is ours.

    Raises: UserError when the class does not go through transformers' AttentionInterface (it would only warn).
    """
    from retrofit.kernels import blockwise, products

    for ours in (blockwise, products):
        if choice.name == ours.NAME:
            ours.register()
    if not model._can_set_attn_implementation():
        raise UserError(
            f"{type(model).__name__} does not let its attention kernel be chosen",
            where=f"kernel: {choice.requested}",
            fix="use kernel: eager with this architecture",
        )
    model.set_attn_implementation(choice.name)
    assert model.config._attn_implementation == choice.name


@contextmanager
def using(model: PreTrainedModel, choice: KernelChoice) -> Iterator[None]:
    """The model with another kernel inside the block, its own afterwards."""
    before = model.config._attn_implementation
    if before == choice.name:
        yield
        return
    apply(model, choice)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def scoring_kernel(model: PreTrainedModel) -> KernelChoice:
    """The kernel of a chunked prefill: blockwise where it can express the model, else an exact one with masks."""
    from retrofit.model.families import describe

    dtype = str(model.dtype).removeprefix("torch.")
    try:
        spec = describe(model.config)
    except UserError:
        own = model.config._attn_implementation
        return KernelChoice(
            "auto", own, f"{model.config.model_type} is not described here; it keeps its own kernel, {own}"
        )
    objection = _objection("blockwise", spec, model.device.type, False, dtype)
    if objection is None:
        reason, tiles = "exact, without a mask, memory linear in the tokens", tiles_of(model, "blockwise")
        return KernelChoice("auto", "blockwise", f"{reason}; {tiles}" if tiles else reason)
    name = "sdpa" if _objection("sdpa", spec, model.device.type, False, dtype) is None else "eager"
    return KernelChoice("auto", name, f"scored with {name} and explicit masks: blockwise cannot, {objection}")


def prove(model: PreTrainedModel, choice: KernelChoice, input_ids_1T: Tensor) -> KernelCheck:
    """Compare the logits of `choice` with eager's: one forward pass, then the same tokens in three cached pieces.

    The model keeps the kernel it had.
    """
    import torch

    dtype = str(model.dtype).removeprefix("torch.")
    reference = KernelChoice("eager", "eager", "reference")
    with torch.inference_mode():
        with using(model, reference):
            expected = _whole(model, input_ids_1T)
        with using(model, choice):
            whole, pieces = _whole(model, input_ids_1T), _pieces(model, input_ids_1T)
    # Through torch, whose maximum with a NaN is NaN; Python's depends on their order.
    difference = float(torch.stack([(logits - expected).abs().max() for logits in (whole, pieces)]).max())
    tolerance = TOLERANCE[dtype]
    # A NaN compares false, so it does not pass.
    passed, tiles = difference <= tolerance, tiles_of(model, choice.name)
    return KernelCheck(choice.name, "eager", difference, tolerance, input_ids_1T.shape[1], passed, tiles)


def tiles_of(model: PreTrainedModel, kernel: str) -> str | None:
    """Which back end computes the tiles of `blockwise` for a model, and why; None on a CPU, which has one.

    Raises: UserError where none is right on this GPU.
    """
    from retrofit.kernels import tile_choice
    from retrofit.model.families import describe

    if kernel != "blockwise" or model.device.type != "cuda":
        return None
    shapes = {(layer.head_dim, layer.query_heads, layer.kv_heads) for layer in describe(model.config).layers}
    choices = [tile_choice.chosen(model.device, tile_choice.Shape(model.dtype, *shape)) for shape in sorted(shapes)]
    return "; ".join(dict.fromkeys(choice.reason for choice in choices))


def _whole(model: PreTrainedModel, ids: Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _pieces(model: PreTrainedModel, ids: Tensor) -> torch.Tensor:
    """Logits of a prefill, a continuation of several tokens, and of a single last token."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    total = ids.shape[1]
    bounds = sorted({0, (total + 1) // 2, max(total - 1, 1), total})
    parts = [
        model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits.float()
        for start, stop in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=1)


def _automatic(spec: AttentionSpec, device: str, training: bool, dtype: str | None) -> KernelChoice:
    for name, reason in _preferences(device, training, dtype, any(layer.window for layer in spec.layers)):
        objection = _objection(name, spec, device, training, dtype)
        if objection is None:
            return KernelChoice("auto", name, reason)
    return KernelChoice("auto", "eager", "the only kernel that expresses this model's attention on this machine")


def _preferences(device: str, training: bool, dtype: str | None, windows: bool) -> list[tuple[str, str]]:
    if device.startswith("cuda"):
        return [
            ("flash_attention_3", "flash-attn 3 is installed and this is CUDA with half precision"),
            ("flash_attention_2", "flash-attn 2 is installed and this is CUDA with half precision"),
            (
                "sdpa",
                "flash-attn is not usable here (not installed, or not half precision); PyTorch's own flash kernel",
            ),
        ]
    blockwise = (
        "blockwise",
        "exact, native grouped-query attention, memory linear in the tokens for cached chunks too",
    )
    products = (
        "products",
        "bfloat16 matrix products, two to three times as fast here as PyTorch's CPU flash op",
    )
    fast = [products] if training and dtype == "bfloat16" else []
    if training and not windows:
        flash = ("sdpa", "whole sequences without padding: PyTorch's CPU flash op, forward and backward")
        return [*fast, flash, blockwise]
    return [
        *fast,
        blockwise,
        ("sdpa", "blockwise cannot express this model's attention; PyTorch's own, with explicit masks"),
    ]


def _objection(kernel: str, spec: AttentionSpec, device: str, training: bool, dtype: str | None) -> str | None:
    """Why `kernel` cannot run this model here; None when it can."""
    cuda = device.startswith("cuda")
    softcap = any(layer.softcap is not None for layer in spec.layers)
    sinks = any(layer.sinks for layer in spec.layers)
    if kernel == "eager":
        return None
    if softcap and kernel in ("sdpa", "blockwise", "products"):
        return "its scores are soft-capped"
    if sinks and kernel in ("sdpa", "blockwise", "products", "flash_attention_2"):
        return "it has attention sinks"
    if kernel == "products" and not training:
        return "it is for training: whole sequences, no cache"
    if kernel == "products" and not device.startswith("cpu"):
        return "it is for CPUs"
    if kernel == "blockwise" and cuda and dtype not in (None, *_HALF):
        return f"PyTorch's CUDA flash op has no {dtype}; load the model in bfloat16"
    if kernel == "blockwise" and cuda and any(layer.head_dim > 256 for layer in spec.layers):
        return "its head dim is above 256"
    if kernel in ("flash_attention_2", "flash_attention_3"):
        status = next(status for status in available() if status.name == kernel)
        if not cuda or not status.available:
            return status.reason if not status.available else "it needs the model on CUDA"
        if dtype not in (None, *_HALF):
            return f"flash-attn has no {dtype}; load the model in bfloat16"
    if kernel == "flex_attention":
        status = next(status for status in available() if status.name == kernel)
        if not status.available:
            return status.reason
        if training and not cuda:
            return "on a CPU it has no backward pass, so it cannot train"
    return None


def _flash_status(name: str, package: str, install: str, cuda: bool) -> KernelStatus:
    if importlib.util.find_spec(package) is None:
        missing = f"the package {package} is not installed" + ("" if cuda else ", and there is no CUDA device")
        return KernelStatus(name, False, missing, install if cuda else f"on a machine with CUDA: {install}")
    if not cuda:
        return KernelStatus(name, False, "there is no CUDA device")
    return KernelStatus(name, True, f"{package} is installed")


def _flex_status(cuda: bool) -> KernelStatus:
    if cuda:
        return KernelStatus("flex_attention", True, "compiled by PyTorch for this GPU")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return KernelStatus("flex_attention", True, f"forward only on a CPU; {COMPILES}")
    return KernelStatus("flex_attention", False, "on a CPU it needs a C++ compiler", "apt-get install g++")
