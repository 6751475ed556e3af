"""Conversion of a checkpoint to fewer KV heads, into the same native architecture.

`first` and `mean` change weights alone, tensor by tensor on the way to disk. The other methods calibrate first
(`calibrate`), layer by layer into a work folder, and their tensors come from there. Either way the checkpoint streams
from shard to shard, and resumes from a work folder that a kill left behind.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.checkpoint.provenance import digest
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.rewrite import Rule, rewrite
from retrofit.checkpoint.side_files import copy_side_files
from retrofit.checkpoint.write import remove_shards
from retrofit.data.calibration import AVERAGED_TOKENS, CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.merge.joint import contiguous_groups
from retrofit.kv_heads.merge.pooling import POOLING, pooled_tensors
from retrofit.kv_heads.repair.outcome import ConvertReport, LayerReport, RepairOutcome
from retrofit.model.completeness import leftovers
from retrofit.model.families import describe, family_of
from retrofit.model.folder import ModelFolder, opened
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Method
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from retrofit.console import Progress

__all__ = ["CalibrationText", "ConvertReport", "LayerReport", "Method", "RepairOutcome", "convert"]

Made = Mapping[str, Callable[[], Tensor]]


def convert(
    source: str | Path | ModelFolder,
    out: Path,
    *,
    kv_heads: int,
    method: Method = "calibrated",
    repair: str = "o_proj",
    text: CalibrationText | None = None,
    averaged_tokens: int = AVERAGED_TOKENS,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    work: Path | None = None,
    moments: Path | None = None,
    read_with: PretrainedConfig | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write `source` with `kv_heads` KV heads per layer into the (existing, staged) folder `out`.

    averaged_tokens: calibration tokens whose attention patterns weigh the values; 0 merges values as they are. dtype:
    of the written weights, the source's own by default. The calibration streams are fp32, their matrix products
    bfloat16 where the processor has them. work: a folder from which a later attempt can resume, together with the
    shards in `out` that were written from it; the caller removes it. moments: a folder for the moments of every layer,
    made when they are whole. read_with: the source's configuration as it will be after the heads, where its window is
    extended next; keys are merged for the distances and rotations of that one. world: the processes that make this
    call with the same text; calibration is dealt out to them, and rank 0 alone writes, into its own `out`, `work` and
    `moments`, of which the others have to see `work` (with calibration and without `work`, `out`).

    Raises UserError where the architecture or the number of heads does not allow it, where a method that calibrates
    has no or too little text, and where the disk has no room for the streams.
    """
    started = time.monotonic()
    model = opened(source)
    checkpoint, config, spec = model.checkpoint, model.config, model.spec
    target = family_of(config).with_kv_heads(config, kv_heads, spec)
    before = spec.layers[0].kv_heads
    groups = contiguous_groups(before, kv_heads)
    notes: list[str] = []
    calibrated, resume, scratch = False, work is not None, None
    reports = [LayerReport(layer.index, groups) for layer in spec.layers]
    try:
        if kv_heads == before:
            notes.append(f"the model already has {before} KV heads: its weights are copied unchanged")
            made: Made = {}
        elif method in POOLING:
            made = pooled_tensors(checkpoint, spec, describe(target), POOLING[method], kv_heads)
        else:
            if text is None:
                raise UserError(
                    f"the method `{method}` needs text to calibrate on",
                    where="convert.calibration.text",
                    fix="name text (`--calibrate TEXT`), or choose `--method mean`",
                )
            calibrated = True
            if work is None and world.main:
                work = scratch = Path(tempfile.mkdtemp(prefix=".streams-", dir=out))
            work = world.share(work)
            assert work is not None
            made, reports, notes = _calibrate(
                checkpoint,
                out,
                config,
                target,
                text,
                kv_heads=kv_heads,
                method=method,
                repair=repair,
                averaged_tokens=averaged_tokens,
                device=device,
                dtype=dtype,
                work=work / "calibration",
                moments=moments,
                read_with=read_with,
                spec=spec,
                world=world,
                progress=progress,
            )
        if world.main:
            rewrite(
                checkpoint,
                out,
                {**_dropped(spec, kv_heads), **dict.fromkeys(leftovers(checkpoint, spec.family))},
                made=made,
                config=target,
                dtype=dtype,
                max_shard_size=max_shard_size,
                resume=resume,
                progress=progress,
            )
            copy_side_files(model.path, out)
        world.wait()
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    tokens_by_kind = text.tokens_by_kind if text is not None and calibrated else {}
    return ConvertReport(
        method=method,
        kv_heads_before=before,
        kv_heads_after=kv_heads,
        layers=tuple(reports),
        tokens=sum(tokens_by_kind.values()),
        kinds=tuple(tokens_by_kind),
        tokens_by_kind=tokens_by_kind,
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def _calibrate(
    checkpoint: Checkpoint,
    out: Path,
    config: PretrainedConfig,
    target: PretrainedConfig,
    text: CalibrationText,
    *,
    kv_heads: int,
    method: str,
    repair: str,
    averaged_tokens: int,
    device: str,
    dtype: torch.dtype | None,
    work: Path,
    moments: Path | None,
    read_with: PretrainedConfig | None,
    spec: AttentionSpec,
    world: World,
    progress: Progress | None,
) -> tuple[Made, list[LayerReport], list[str]]:
    """Changed tensors, read from the work folder when they are asked for (in rank 0); a report of each layer; notes.

    Shards in `out` stay only where the calibration that they were written from was already whole.
    """
    # Imported here: what calibrates needs model classes, and pooling heads should not wait for them.
    from retrofit.kv_heads.calibrate.layerwise import CalibratedRun
    from retrofit.kv_heads.calibrate.moments import MomentsSource
    from retrofit.kv_heads.calibrate.settings import Settings, pooled_keys
    from retrofit.kv_heads.merge.baselines import METHODS
    from retrofit.kv_heads.repair.repairs import REPAIRS

    settings = Settings(
        kv_heads=kv_heads,
        method=METHODS[method],
        method_name=method,
        repairs=REPAIRS[repair],
        averaged_tokens=averaged_tokens,
        keep_moments=moments is not None,
        read_with=read_with,
    )
    run = CalibratedRun(
        checkpoint,
        config,
        target,
        settings,
        text,
        work=work,
        device=device,
        dtype=dtype,
        spec=spec,
        world=world,
        progress=progress,
    )
    # Before the first layer is done: a kill must never leave them beside another calibration that is whole.
    if world.main and not run.work.whole_before and (removed := remove_shards(out)) and progress:
        progress.note(f"{removed} weight files were written from another calibration, and are written again")
    reports, notes = run.all_layers(), [*run.notes]
    if not world.main:
        return {}, reports, [*notes, *pooled_keys(reports)]
    if moments is not None:
        origin = MomentsSource(digest(checkpoint.folder), f"converted to {kv_heads} KV heads", text.content)
        run.work.copy_moments(moments, origin)

    def read(layer: int, name: str) -> Callable[[], Tensor]:
        return lambda: run.work.tensor(layer, name)

    made = {name: read(layer, name) for name, layer in run.work.tensor_names().items()}
    return made, reports, [*notes, *pooled_keys(reports)]


def _dropped(spec: AttentionSpec, kv_heads: int) -> dict[str, Rule | None]:
    """Norm weights of heads that are gone."""
    gone: dict[str, Rule | None] = {}
    for layer in spec.layers:
        if layer.k_norm is not None and layer.qk_norm_weights == "separate":
            gone |= {layer.k_norm.format(head=head): None for head in range(kv_heads, layer.kv_heads)}
    return gone
