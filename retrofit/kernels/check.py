"""Proof that a kernel is right: its logits against those of eager attention, on the loaded model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.kernels.registry import KernelChoice, tiles_of, using

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

# Largest |logit difference| to eager that rounding explains in most models, over some 10^7 logits. In bfloat16
# PyTorch's own sdpa differs by 1.3 (SmolLM2-135M, 768 tokens), so prove in float32 wherever the kernel has it.
TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "float16": 0.3, "bfloat16": 2.5}
# Some models amplify rounding far more: with mean-pooled heads SmolLM2's logits move by 0.002 in float32 when its
# embeddings move by a unit in the last place, the original's by 0.0001. A right kernel moves them by half to twice as
# much as that (docs/evaluation.md, Kernels), so it may move them by this many times as much.
AMPLIFIED = 4


@dataclass(frozen=True)
class KernelCheck:
    """Largest |logit difference| between kernel and `reference`, over one forward pass and a cached continuation.

    rounding: the same between `reference` and itself with every embedding moved by a unit in the last place. tiles:
    which back end computes the tiles of `blockwise`, and why; None where there is no choice.
    """

    kernel: str
    reference: str
    max_difference: float
    tolerance: float
    tokens: int
    passed: bool
    tiles: str | None = None
    rounding: float = 0.0


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
            moved = _moved(model, input_ids_1T, torch.finfo(model.dtype).eps)
        with using(model, choice):
            whole, pieces = _whole(model, input_ids_1T), _pieces(model, input_ids_1T)
    rounding = float((moved - expected).abs().max())
    # Through torch, whose maximum with a NaN is NaN; Python's depends on their order.
    difference = float(torch.stack([(logits - expected).abs().max() for logits in (whole, pieces)]).max())
    tolerance = max(TOLERANCE[dtype], float(f"{AMPLIFIED * rounding:.3g}"))
    # A NaN compares false, so it does not pass.
    passed, tiles = difference <= tolerance, tiles_of(model, choice.name)
    return KernelCheck(choice.name, "eager", difference, tolerance, input_ids_1T.shape[1], passed, tiles, rounding)


def _whole(model: PreTrainedModel, ids: Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _moved(model: PreTrainedModel, ids: Tensor, share: float) -> torch.Tensor:
    """Logits when every number of the embeddings is larger or smaller by that share of itself, at random."""
    import torch

    embedded = model.get_input_embeddings()(ids)
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same signs on every device
    signs = 2 * torch.randint(0, 2, embedded.shape, generator=generator).to(embedded) - 1
    return model(inputs_embeds=embedded * (1 + share * signs), use_cache=False).logits.float()


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
