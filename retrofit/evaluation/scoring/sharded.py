"""One long text read by several ranks together: each holds a share of its tokens, and none holds all keys and values.

A rank runs the model once over its share, layer by layer, with ring attention; there is no KV cache. What exists at a
time is a few tensors of share x width and the keys and values of two shares in one layer, so N ranks read a text N
times as long as one could this way. MLPs and logits, which are wider, are computed in rows.

Legend: T tokens read, n of this rank, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from retrofit.evaluation.scoring.reader import head_of, require_positions
from retrofit.kernels.ring_group import Ring
from retrofit.kernels.sequence_parallel import sequence_parallel
from retrofit.model.families import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

MLP_ROWS = 2048
"""Tokens that go through an MLP at a time: enough to fill a GPU, and its intermediate tensors stay small."""
_MLPS = (".mlp", ".block_sparse_moe", ".shared_mlp")


class ShardedReader:
    """Reads texts together with the other ranks of a group, as `reader.Reader` does alone and with the same losses.

    All ranks of `group` make the same calls with the same tokens. rows: of logits that exist at a time.
    """

    def __init__(self, model: PreTrainedModel, group: ProcessGroup | None, *, rows: int = 256) -> None:
        self.model, self.group, self.rows = model, group, rows
        self._end = describe(model.config).learned_positions

    def rewind(self, tokens: int) -> None:
        """Forget what was read. tokens: 0, as nothing is kept."""
        assert tokens == 0, "shares are not kept, so there is no token to go back to"

    def predicted(self, ids_T: Tensor, next_T: Tensor, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Read `ids_T`, whose token i is followed by next_T[i]; yields (T, losses float32 of what follows those from
        `first` on, in nats), on every rank.

        Raises: UserError for fewer tokens than two chunks a rank, or attention that cannot be split.
        """
        require_positions(self._end, len(ids_T))
        ring = Ring.over(len(ids_T), self.group, ids_T.device)
        with sequence_parallel(ring, self.model), mlps_in_rows(self.model, MLP_ROWS):
            hidden_1nC = self.model.get_decoder()(**ring.inputs(ids_T[None]), use_cache=False).last_hidden_state
        own_n = ring.shard(next_T[None])[0]
        losses_n = torch.empty(len(own_n), dtype=torch.float32, device=ids_T.device)
        with head_of(self.model) as head:
            for start in range(0, len(own_n), self.rows):
                stop = start + self.rows
                logits_RV = head(hidden_1nC[:, start:stop])[0].float()
                losses_n[start:stop] = nn.functional.cross_entropy(logits_RV, own_n[start:stop], reduction="none")
        yield len(ids_T), ring.unshard(losses_n[None])[0, first:].cpu()


@contextmanager
def mlps_in_rows(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """Inside the block, the MLP of every layer takes `rows` tokens at a time: it sees one token by itself."""
    every = [(name, module) for name, module in model.get_decoder().named_modules() if name.endswith(_MLPS)]
    layers, mlps = {name.rpartition(".")[0] for name, _ in every}, [module for _, module in every]
    assert len(layers) == model.config.num_hidden_layers, f"MLPs in {len(layers)} layers"
    for mlp in mlps:
        mlp.forward = _in_rows(mlp.forward, rows)
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


def _in_rows(forward: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    def chunked(hidden_BTC: Tensor) -> Tensor:
        return torch.cat([forward(part) for part in hidden_BTC.split(rows, 1)], 1)

    return chunked
