"""Windows in chosen layers of a checkpoint, in the same architecture.

Sinks and repairs are fitted layer by layer into a work folder (`layerwise`); the checkpoint then streams from shard to
shard with these tensors in the place of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.checkpoint.rewrite import rewrite
from retrofit.checkpoint.side_files import copy_side_files
from retrofit.checkpoint.write import remove_shards
from retrofit.data.calibration import CalibrationText
from retrofit.model.completeness import leftovers
from retrofit.model.families import family_of
from retrofit.model.folder import ModelFolder
from retrofit.system.world import ALONE, World
from retrofit.windows.layerwise import WindowedRun, Windows
from retrofit.windows.outcome import Rise, WindowLayerReport
from retrofit.windows.rows import Repeats

if TYPE_CHECKING:
    from retrofit.console import Progress


def add_windows(
    model: ModelFolder,
    out: Path,
    windows: Windows,
    text: CalibrationText,
    rows: Repeats,
    *,
    work: Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    world: World = ALONE,
    progress: Progress | None = None,
) -> tuple[list[WindowLayerReport], Rise]:
    """Write `model` with windows into the (existing, staged) folder `out`; what was done to each layer, and what the
    loss on `rows` rises by.

    text: to fit on. rows: of other text, to measure on, and to check repairs on. dtype: of the written weights, the
    model's own by default. work: a folder from which a later attempt can resume, together with the shards in `out` that
    were written from it; the caller removes it. world: the processes that make this call with the same text; rank 0
    alone writes. Raises UserError where the architecture cannot hold these windows, and where the disk has no room.
    """
    spec, family = model.spec, family_of(model.config)
    everywhere = windows.windowed | {layer.index for layer in spec.layers if layer.window is not None}
    config = family.with_windows(model.config, windows.size, everywhere)
    run = WindowedRun(model, windows, text, rows, work=work, device=device, dtype=dtype, world=world, progress=progress)
    # Before the first layer is done: a kill must never leave them beside another calibration that is whole.
    if world.main and not run.work.whole_before and (removed := remove_shards(out)) and progress:
        progress.note(f"{removed} weight files were written from another calibration, and are written again")
    reports, rise = run.all_layers()

    def read(layer: int, name: str) -> Callable[[], Tensor]:
        return lambda: run.work.tensor(layer, name)

    if world.main:
        rewrite(
            model.checkpoint,
            out,
            dict.fromkeys(leftovers(model.checkpoint, spec.family)),
            made={name: read(layer, name) for name, layer in run.work.tensor_names().items()},
            config=config,
            dtype=dtype,
            max_shard_size=max_shard_size,
            resume=True,
            progress=progress,
        )
        copy_side_files(model.path, out)
    world.wait()
    return reports, rise
