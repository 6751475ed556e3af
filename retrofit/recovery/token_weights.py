"""Weights of the tokens of long rows by how much they need the long context: the loss LongCE.

Fang et al. 2025, "What is Wrong with Perplexity for Long-context Language Modeling?" (arXiv:2410.23771, section 4):

    L = - sum_i w_i log p(x_i | l_i) / sum_i w_i,    w_i = min(p(x_i | l_i) / p(x_i | s_i), 5)

l_i is all of the row before token i, s_i its last K to 1.25 K - 1 tokens, with K = 4,096 or a quarter of the row where
that is less. Windows, alignment and the bound of 5 are those of the authors' code (github.com/PKU-ML/LongPPL,
`loss_weight` of finetune/finetune.py, whose loop a test repeats); tokens whose whole context is short weigh 1. Three
things differ: the authors' K is 4,096 for every row; the weights here are those of the student as the training begins,
not of every step, so that all is laid out beforehand and a step divides by the weights of all its tokens, whichever
process has them; and it divides by their sum, where the authors divide by the number of tokens.

Legend: N rows, T tokens of a row, C model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrofit.evaluation.metrics.longppl import SHORT_CONTEXT, short_windows, soft_weights
from retrofit.recovery.layout import ONE_PROCESS, Layout
from retrofit.recovery.schedule import TrainRows
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from retrofit.console import Progress

Losses = Callable[[Tensor], Tensor]
"""Token ids [1, T] -> losses of the tokens from the second on, [T - 1], float32 on the CPU."""


def short_context(length: int) -> int:
    """K for a row of `length` tokens."""
    return min(SHORT_CONTEXT, length // 4)


def text_weights(losses: Losses, ids_T: Tensor) -> Tensor:
    """Weights [T] of one text; that of token i is for the token that follows it, the last one's is 1."""
    length = len(ids_T)
    long_T = losses(ids_T[None])
    short_T = long_T.clone()
    spans = list(short_windows(short_context(length)).spans(length))
    for span in spans[1:]:  # the tokens of the first window have all of the text before them
        scored = losses(ids_T[None, span.begin : span.stop])[span.first - span.begin - 1 :]
        short_T[span.first - 1 : span.stop - 1] = scored
    weights = soft_weights(long_T.double().numpy(), short_T.double().numpy())
    return torch.cat([torch.from_numpy(weights).float(), torch.ones(1)])


def weighed(
    lines: TrainRows,
    losses: Losses,
    *,
    world: World = ALONE,
    layout: Layout = ONE_PROCESS,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Weights [N, T] of all rows: of those that are learned with positions 0, 1, 2, ..., 1 for the others.

    losses: of the student as the training begins; processes that share a row call it together, and rows are dealt out
    to the others, all of which call this. kept: a file that the weights are read from, or written to.
    """
    found = world.share(load_file(kept)["weights"] if world.main and kept is not None and kept.is_file() else None)
    if found is not None:
        return found
    weights_NT = torch.ones(lines.ids_NT.shape)
    rows = [row for row, learned in enumerate(lines.learned) if learned and lines.positions_of([row]) is None]
    if progress is not None:
        progress.start("weighing tokens", len(rows) * lines.ids_NT.shape[1], "tokens")
    for cut in dict.fromkeys(lines.cuts[row] for row in rows):  # as many passes in every process at one time
        alike = [row for row in rows if lines.cuts[row] == cut]
        for row, row_T in _dealt(lines, alike, cut, losses, layout, world, progress).items():
            weights_NT[row] = row_T
    if progress is not None:
        progress.finish()
    if kept is not None and world.main:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")  # a kill leaves no half of it under its name
        save_file({"weights": weights_NT}, partial)
        partial.replace(kept)
    return weights_NT


def about_weights(lines: TrainRows) -> str:
    """What came out."""
    assert lines.weights_NT is not None
    learned = torch.tensor(lines.learned)
    weights = lines.weights_NT[learned]
    return (
        f"{weights.numel():,} tokens that are learned have a mean weight of {float(weights.mean()):.3g} (LongCE); "
        f"{float((weights > 2).float().mean()):.1%} count more than twice"
    )


def _dealt(
    lines: TrainRows,
    rows: Sequence[int],
    cut: int,
    losses: Losses,
    layout: Layout,
    world: World,
    progress: Progress | None,
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for turn in range(math.ceil(len(rows) / layout.data_ranks)):
        # One that has no row any more computes another's once more: weights may be split over all of them.
        row = rows[min(turn * layout.data_ranks + layout.data_rank, len(rows) - 1)]
        texts = lines.ids_NT[row].view(-1, cut)
        found[row] = torch.cat([text_weights(losses, ids_T) for ids_T in texts])
        if progress is not None:
            progress.advance(layout.data_ranks * lines.ids_NT.shape[1])
    return {row: weights_T for part in world.gather(found) for row, weights_T in part.items()}
