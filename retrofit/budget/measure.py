"""What a checkpoint loses on rows with a passage that comes again, served with a cache of some type."""

from __future__ import annotations

import gc

import torch

from retrofit.budget.rows import Loss
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import reading
from retrofit.kernels.rounded_cache import round_cache
from retrofit.model.folder import ModelFolder
from retrofit.windows.rows import Repeats


def losses_on(model: ModelFolder, rows: Repeats, cache_dtype: str, *, device: str) -> Loss:
    """Mean losses of text beyond the window that the rows are made for, and of the second copies of their passages.

    cache_dtype: as a serving engine stores keys and values. Not a rise: the losses themselves.
    """
    loaded = model.load(dtype=model.working_dtype("auto", device), device=device)
    round_cache(loaded, cache_dtype)
    found = []
    with reading(loaded, None, None):
        reader = Reader(loaded, rows.length)
        for ids_R in rows.input_ids_NR.to(loaded.device):
            reader.rewind(0)
            found.append(torch.cat([losses for _, losses in reader.predicted(ids_R[:-1], ids_R[1:])]))
    means = rows.means(torch.stack(found)[:, rows.positions])
    del loaded
    gc.collect()
    return Loss(means["far"], means["answers"])
