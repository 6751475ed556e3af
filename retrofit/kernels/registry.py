"""The one door to attention kernels: which there are, which one a model gets and why, and proof that it is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.errors import UserError
from retrofit.kernels.availability import COMPILES, FLASH, HUB_KERNELS, KernelStatus, Machine, available
from retrofit.model.spec import AttentionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KERNELS = ("eager", "sdpa", *FLASH, *HUB_KERNELS, "flex_attention", "blockwise")
# `products` is not among them: it cannot be asked for, as it serves nothing but the training that "auto" gives it to.

_HALF = ("float16", "bfloat16")
_FLASH_WITH_SINKS = ("flash_attention_4", "kernels-community/vllm-flash-attn3")


@dataclass(frozen=True)
class KernelChoice:
    """The kernel that `requested` became, and why."""

    requested: str
    name: str
    reason: str


def choose(
    kernel: str,
    spec: AttentionSpec,
    device: str,
    *,
    training: bool = False,
    dtype: str | None = None,
    machine: Machine | None = None,
) -> KernelChoice:
    """The kernel for a model. device: "cpu", "mps" or "cuda[:n]". dtype: of the weights, where known ("bfloat16", ...).

    training: forward and backward over whole sequences without padding and without a cache. machine: this one by
    default.

    Raises: UserError for an unknown name, a kernel this machine lacks, or one that cannot express this attention.
    """
    if kernel == "auto":
        return _automatic(spec, device, training, dtype, machine)
    if kernel not in KERNELS:
        raise UserError(f"`{kernel}` is not a kernel", where="kernel", fix=f"choose one of auto, {', '.join(KERNELS)}")
    objection = _objection(kernel, spec, device, training, dtype, machine)
    if objection:
        instead = _automatic(spec, device, training, dtype, machine).name
        raise UserError(
            f"kernel `{kernel}` cannot run this model: {objection}",
            where=f"kernel, for {spec.family} on {device}",
            fix=f"use kernel: {instead}, or auto" if instead in KERNELS else "use kernel: auto",
        )
    if kernel in FLASH or kernel in HUB_KERNELS:
        status = _status(kernel, machine)
        return KernelChoice(kernel, status.implementation or kernel, f"asked for; {status.reason}")
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
    try:
        model.set_attn_implementation(choice.name)
    except (ImportError, OSError, ValueError) as error:
        if choice.name not in HUB_KERNELS:
            raise
        raise UserError(
            f"the kernel {choice.name} could not be loaded: {error}",
            where=f"kernel: {choice.requested}",
            fix="check the connection to the hub and the version of the package kernels, or use kernel: auto",
        ) from error
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
    device = model.device.type
    objection = _objection("blockwise", spec, device, False, dtype)
    if objection is None:
        reason, tiles = "exact, without a mask, memory linear in the tokens", tiles_of(model, "blockwise")
        return KernelChoice("auto", "blockwise", f"{reason}; {tiles}" if tiles else reason)
    others = ("sdpa", "flex_attention") if model.device.type == "cuda" else ("sdpa",)
    name = next((name for name in others if _objection(name, spec, device, False, dtype) is None), "eager")
    return KernelChoice("auto", name, f"scored with {name} and explicit masks: blockwise cannot, {objection}")


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


def _automatic(
    spec: AttentionSpec, device: str, training: bool, dtype: str | None, machine: Machine | None
) -> KernelChoice:
    for name, reason in _preferences(device, training, dtype, any(layer.window for layer in spec.layers)):
        if name in FLASH and _status(name, machine).implementation is not None:
            continue  # of the hub: foreign code is loaded only where a person asks for it
        objection = _objection(name, spec, device, training, dtype, machine)
        if objection is None:
            return KernelChoice("auto", name, reason)
    return KernelChoice("auto", "eager", "the only kernel that expresses this model's attention on this machine")


def _preferences(device: str, training: bool, dtype: str | None, windows: bool) -> list[tuple[str, str]]:
    if device.startswith("cuda"):
        flash = [(name, f"{FLASH[name].package} is installed and this is CUDA with half precision") for name in FLASH]
        return [
            *reversed(flash),
            (
                "sdpa",
                "flash-attn is not usable here (not installed, or not half precision); PyTorch's own flash kernel",
            ),
            ("blockwise", "attention sinks, forward and backward, over the fastest tiles that are right on this GPU"),
            ("flex_attention", "soft-capped scores or sinks, compiled by PyTorch for this GPU"),
        ]
    if device.startswith("mps"):
        return [("sdpa", "PyTorch's own, the only one besides eager on MPS")]
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
        sdpa = ("sdpa", "whole sequences without padding: PyTorch's CPU flash op, forward and backward")
        return [*fast, sdpa, blockwise]
    return [
        *fast,
        blockwise,
        ("sdpa", "blockwise cannot express this model's attention; PyTorch's own, with explicit masks"),
    ]


def _objection(
    kernel: str,
    spec: AttentionSpec,
    device: str,
    training: bool,
    dtype: str | None,
    machine: Machine | None = None,
) -> str | None:
    """Why `kernel` cannot run this model here; None when it can."""
    cuda = device.startswith("cuda")
    flash = kernel in FLASH or kernel in HUB_KERNELS
    softcap = any(layer.softcap is not None for layer in spec.layers)
    if kernel == "eager":
        return None
    if softcap and kernel in ("sdpa", "blockwise", "products"):
        return "its scores are soft-capped"
    if any(layer.sinks for layer in spec.layers) and (objection := _sinks_objection(kernel, cuda, training, machine)):
        return objection
    if kernel == "products" and not training:
        return "it is for training: whole sequences, no cache"
    if kernel == "products" and not device.startswith("cpu"):
        return "it is for CPUs"
    if kernel == "blockwise" and device.startswith("mps"):
        return "PyTorch has no attention kernel with a log-sum-exp for MPS"
    if kernel == "blockwise" and cuda and dtype not in (None, *_HALF):
        return f"the attention kernels of CUDA with a log-sum-exp have no {dtype}; load the model in bfloat16"
    if kernel == "blockwise" and cuda and any(layer.head_dim > 256 or layer.head_dim % 8 for layer in spec.layers):
        return "its head dim is above 256, or no multiple of 8"
    if flash:
        status = _status(kernel, machine)
        if not cuda or not status.available:
            return status.reason if not status.available else "it needs the model on CUDA"
        if dtype not in (None, *_HALF):
            return f"flash-attn has no {dtype}; load the model in bfloat16"
    if kernel == "flex_attention":
        if device.startswith("mps"):
            return "PyTorch does not compile it for MPS"
        status = _status(kernel, machine)
        if not status.available:
            return status.reason
        if training and not cuda:
            return "on a CPU it has no backward pass, so it cannot train"
    return None


def _sinks_objection(kernel: str, cuda: bool, training: bool, machine: Machine | None) -> str | None:
    """Why `kernel` cannot run a model with attention sinks; None when it can, as far as sinks go.

    transformers gives sinks to flex_attention and to the two builds of flash attention that take them, without a
    gradient; to another build it gives none, and says nothing.
    """
    if kernel in ("blockwise", "products"):
        return None
    if kernel == "flex_attention":
        return None if cuda else "it has attention sinks, which need a log-sum-exp that it gives on CUDA only"
    build = (_status(kernel, machine).implementation or kernel) if kernel in FLASH else kernel
    if build not in _FLASH_WITH_SINKS:
        return "it has attention sinks"
    return "it has attention sinks, for which this kernel has no gradient" if training else None


def _status(kernel: str, machine: Machine | None) -> KernelStatus:
    return next(status for status in available(machine) if status.name == kernel)
