"""One sequence over the ranks of a group: which of its tokens this rank holds, and how to share out and gather tensors.

Legend: B batch, T tokens of the sequence, n of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels.placement import Placement, Runs, count, zigzag


@dataclass(frozen=True)
class Ring:
    """One sequence over a group. rank: of this process in it. group: None for the default one, or for no other rank."""

    placement: Placement
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        ranks = _ranks(self.group)
        if ranks != self.placement.ranks:
            raise UserError(
                f"a sequence in {self.placement.ranks} shares over a group of {ranks} ranks",
                fix="place the sequence over as many ranks as the group has",
            )

    @classmethod
    def over(cls, tokens: int, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> Ring:
        """A sequence of `tokens` tokens, zigzag over a group. device: where its tensors are.

        Raises: UserError where the ranks have sequences of different lengths, or fewer tokens than chunks.
        """
        placement = zigzag(tokens, _ranks(group))
        if placement.ranks == 1:
            return cls(placement, 0, group)
        # Also the first collective of the group, in which NCCL wants every rank.
        ends = torch.tensor([tokens, -tokens], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
        if int(ends[0]) != -int(ends[1]):
            raise UserError(
                f"ranks that share one sequence have different ones: {-int(ends[1])} to {int(ends[0])} tokens",
                fix="give every rank of the group the same sequence",
            )
        return cls(placement, dist.get_rank(group), group)

    @property
    def runs(self) -> Runs:
        """The runs of positions that this rank holds."""
        return self.placement.shares[self.rank]

    def shard(self, x_BT: Tensor) -> Tensor:
        """This rank's share [B, n, ...] of a tensor [B, T, ...] over the whole sequence."""
        return x_BT[:, self.placement.positions(self.rank).to(x_BT.device)]

    def unshard(self, x_Bn: Tensor) -> Tensor:
        """The whole [B, T, ...] of the shares [B, n, ...] of all ranks, on every rank; not differentiable."""
        counts = [count(runs) for runs in self.placement.shares]
        if self.placement.ranks == 1:
            return x_Bn
        padded = x_Bn.new_zeros((x_Bn.shape[0], max(counts), *x_Bn.shape[2:]))
        padded[:, : x_Bn.shape[1]] = x_Bn
        shares = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(shares, padded, group=self.group)
        whole = torch.cat([share[:, :n] for share, n in zip(shares, counts, strict=True)], 1)
        return whole[:, self.placement.order().to(whole.device)]

    def inputs(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """What a model takes for this rank's share of `ids_BT`: token ids, their positions, and a mask of ones."""
        own = self.shard(ids_BT)
        positions = self.placement.positions(self.rank).to(own.device)[None].expand_as(own)
        return {"input_ids": own, "position_ids": positions, "attention_mask": torch.ones_like(own)}

    def next_tokens(self, labels_BT: Tensor, ignore: int = -100) -> Tensor:
        """The labels [B, n] of this rank's tokens: those of the tokens after them; `ignore` after the last."""
        shifted = torch.full_like(labels_BT, ignore)
        shifted[:, :-1] = labels_BT[:, 1:]
        return self.shard(shifted)


def _ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if group is not None or dist.is_initialized() else 1
