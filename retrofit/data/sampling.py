"""Sampling from a language model: many sequences at once over a cache of fixed size, without waiting for the host.

Every sequence has random numbers of its own, one for each token, so that what it says depends neither on the others of
its batch nor on when it is sampled. A token is the inverse of the cumulative distribution at that number.

Legend: B sequences, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from retrofit.kernels import decode
from retrofit.kernels.registry import using
from retrofit.kernels.stepping import CHOICE, GrowingSlots, Stepper, no_graph
from retrofit.model.spec import AttentionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROW = 64  # slots by which the cache of a CPU grows: what is not written yet is not read
_BLOCK = 256  # entries of a row that are summed before the sums are


def random_numbers(key: str, count: int) -> Tensor:
    """`count` numbers in [0, 1) that depend on `key` alone, float32."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    spec: AttentionSpec,
    starts: Sequence[Sequence[int]],
    uniform_BT: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stepped: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Tensor:
    """Token ids [B, T] (int64, on the CPU) of B sequences that begin with `starts`, the first token of each left out.

    starts: at least one token each, of which tokens beyond T + 1 are not read. uniform_BT: the numbers in [0, 1) that
    decide about the tokens. temperature: divides the logits. top_p: only the most probable tokens that together have
    this probability are drawn (Holtzman et al. 2020, arXiv 1904.09751). A sequence that ends goes on after its EOS with
    whatever the model writes next. stepped: called with B after each token, which a GPU may still be computing.
    note: called with a line where no CUDA graph of the step could be made.
    """
    assert all(starts)
    decode.register()
    with using(model, CHOICE):
        sampler = Sampler(model, spec, starts, uniform_BT, temperature, top_p)
        if no_graph(model, spec) is None:
            sampler = _captured(sampler, note) or Sampler(model, spec, starts, uniform_BT, temperature, top_p)
        for token in range(uniform_BT.shape[1]):
            sampler.make_room(token)
            sampler.step()
            if stepped is not None:
                stepped(len(starts))
        return sampler.out_BT.cpu()


def _captured(sampler: Sampler, note: Callable[[str], None] | None) -> Sampler | None:
    """The sampler with its step as a CUDA graph; None where that cannot be made."""
    try:
        sampler.capture()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if note is not None:
            note(f"samples are written without a CUDA graph: {str(error).splitlines()[0]}")
        return None
    return sampler


class Sampler(Stepper):
    """The state of `sample_batch`: the tokens so far, and the numbers that decide about the next ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: AttentionSpec,
        starts: Sequence[Sequence[int]],
        uniform_BT: Tensor,
        temperature: float,
        top_p: float,
    ) -> None:
        batch, tokens = uniform_BT.shape
        device = model.device
        position = torch.zeros(1, dtype=torch.long, device=device)
        slots = min(GROW, tokens) if device.type == "cpu" else tokens
        self.layers = [GrowingSlots(slots, layer.window, position) for layer in spec.layers]
        given_BT = torch.full((batch, tokens), -1)
        for row_T, start in zip(given_BT, starts, strict=True):
            known = torch.tensor(start[1 : tokens + 1], dtype=torch.long)
            row_T[: len(known)] = known
        self.first_B1 = torch.tensor([[start[0]] for start in starts], device=device)
        self.given_BT, self.uniform_BT = given_BT.to(device), uniform_BT.to(device)
        self.out_BT = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        self.temperature, self.top_p = temperature, top_p
        super().__init__(model, self.layers, self.first_B1.clone(), position)

    def make_room(self, token: int) -> None:
        """Slots for the token at this position."""
        tokens = self.out_BT.shape[1]
        for layer in self.layers if self._graph is None else ():
            layer.grow(min(tokens, token + GROW - token % GROW))

    def reset(self) -> None:
        self.token.copy_(self.first_B1)
        self.position.zero_()

    def advance(self) -> None:
        uniform_B1 = self.uniform_BT.index_select(1, self.position)
        drawn_B1 = draw(self.logits(), uniform_B1, temperature=self.temperature, top_p=self.top_p)
        given_B1 = self.given_BT.index_select(1, self.position)
        self.token.copy_(torch.where(given_B1 < 0, drawn_B1, given_B1))
        self.out_BT.index_copy_(1, self.position, self.token)
        self.position.add_(1)


def draw(logits_BV: Tensor, uniform_B1: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The token [B, 1] of each row at which its cumulative distribution passes the number in [0, 1)."""
    weights_BV = logits_BV.to(torch.float32, copy=True)
    weights_BV.sub_(weights_BV.amax(-1, keepdim=True))
    if temperature != 1:
        weights_BV.div_(temperature)
    weights_BV.exp_()
    if top_p == 1:
        return _inverse(weights_BV, uniform_B1)
    sorted_BN, token_BN = nucleus(weights_BV, top_p)
    return token_BN.gather(1, _inverse(sorted_BN, uniform_B1))


def nucleus(weights_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(weights [B, N] from the largest down, zero outside of the nucleus, and their columns in `weights_BV`).

    The nucleus has the fewest largest weights that sum to at least `top_p` of the row's sum. On a CPU, where sorting a
    row takes ten times as long as the model, only weights that can be in it are sorted: those below (1 - top_p) / V of
    the sum come to less than 1 - top_p of it together.
    """
    total_B1 = weights_BV.sum(-1, keepdim=True)
    columns_BN: Tensor | None = None
    if weights_BV.device.type == "cpu":
        weights_BV, columns_BN = _packed(weights_BV, weights_BV >= total_B1 * ((1 - top_p) / weights_BV.shape[1]))
    sorted_BN, order_BN = weights_BV.sort(dim=-1, descending=True, stable=True)
    before_BN = sorted_BN.cumsum(-1) - sorted_BN
    sorted_BN = sorted_BN.masked_fill(before_BN >= top_p * total_B1, 0.0)
    return sorted_BN, order_BN if columns_BN is None else columns_BN.gather(1, order_BN)


def _packed(weights_BV: Tensor, chosen_BV: Tensor) -> tuple[Tensor, Tensor]:
    """(the chosen weights of each row at its front [B, N], zeros behind them; their columns)."""
    rows, columns = chosen_BV.nonzero(as_tuple=True)
    counts_B = chosen_BV.sum(-1)
    places = torch.arange(len(rows)) - (counts_B.cumsum(0) - counts_B)[rows]
    weights_BN = torch.zeros(len(counts_B), int(counts_B.max()))
    columns_BN = torch.zeros(weights_BN.shape, dtype=torch.long)
    weights_BN[rows, places] = weights_BV[rows, columns]
    columns_BN[rows, places] = columns
    return weights_BN, columns_BN


def _inverse(weights_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """The column [B, 1] at which the cumulative sum of a row passes `uniform` of its total, never one of weight 0.

    In two levels, as a cumulative sum over a whole vocabulary is slow, and less exact.
    """
    size = -(-weights_BV.shape[1] // _BLOCK)
    blocks_BNb = F.pad(weights_BV, (0, size * _BLOCK - weights_BV.shape[1])).view(-1, size, _BLOCK)
    sums_BN = blocks_BNb.sum(-1)
    ends_BN = sums_BN.cumsum(-1)
    target_B1 = uniform_B1 * ends_BN[:, -1:]
    block_B1 = _passing(ends_BN, target_B1)
    rest_B1 = target_B1 - (ends_BN.gather(1, block_B1) - sums_BN.gather(1, block_B1))
    inside_Bb = blocks_BNb.gather(1, block_B1[..., None].expand(-1, 1, _BLOCK))[:, 0].cumsum(-1)
    return block_B1 * _BLOCK + _passing(inside_Bb, rest_B1)


def _passing(ends_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first column [B, 1] whose cumulative sum is above the target; at most the last that adds to it."""
    above = (ends_BN <= target_B1).sum(-1, keepdim=True)
    return torch.minimum(above, (ends_BN < ends_BN[:, -1:]).sum(-1, keepdim=True))
