"""What a checkpoint loses on rows with a passage that comes again, served with a cache of some type.

Legend: R tokens of a row.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.budget.rows import Loss
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import reading
from retrofit.kernels.rounded_cache import round_cache
from retrofit.model.cache_dtype import AUTO
from retrofit.model.folder import ModelFolder
from retrofit.system.world import ALONE, World
from retrofit.windows.rows import Repeats


def losses_on(model: ModelFolder, rows: Repeats, cache_dtype: str, *, device: str, world: World = ALONE) -> Loss:
    """Mean losses of text beyond the window that the rows are made for, and of the second copies of their passages.

    cache_dtype: as a serving engine stores keys and values. world: the processes that make this call; rows are dealt
    out to them, and all return the same. Not a rise: the losses themselves.
    """
    own = world.mine(list(rows.input_ids_NR))
    losses = world.merged(_read(model, own, cache_dtype, device) if own else [])
    means = rows.means(torch.stack(losses)[:, rows.positions])
    return Loss(means["far"], means["answers"])


def answers_on(rows: Repeats, model: ModelFolder, device: str, world: World) -> float:
    """The loss of second copies alone, with a cache as the model computes."""
    return losses_on(model, rows, AUTO, device=device, world=world).answers


def _read(model: ModelFolder, rows: Sequence[Tensor], cache_dtype: str, device: str) -> list[Tensor]:
    """Losses of each row's tokens after the first, [R - 1]."""
    loaded = model.load(dtype=model.working_dtype("auto", device), device=device)
    round_cache(loaded, cache_dtype)
    found = []
    with reading(loaded, None, None):
        reader = Reader(loaded, len(rows[0]))
        for ids_R in (row.to(loaded.device) for row in rows):
            reader.rewind(0)
            found.append(torch.cat([losses for _, losses in reader.predicted(ids_R[:-1], ids_R[1:])]).cpu())
    del loaded
    gc.collect()
    return found
