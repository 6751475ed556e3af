"""Stream a checkpoint through rules, one tensor in memory at a time.

A tensor without a rule is copied as bytes inside the kernel, near the speed of `cp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.checkpoint.place import require_free_space
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.write import HEADER_RESERVE, ShardWriter, write_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from retrofit.console import Progress

Rule = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Rewritten:
    """What `rewrite` wrote: shard file names, bytes of tensors, and which tensors were copied, changed, dropped."""

    shards: tuple[str, ...]
    nbytes: int
    copied: tuple[str, ...]
    changed: tuple[str, ...]
    dropped: tuple[str, ...]


def rewrite(
    source: Checkpoint,
    out: str | Path,
    rules: Mapping[str, Rule | None],
    *,
    config: Mapping[str, Any] | PretrainedConfig,
    extra: Mapping[str, Callable[[], Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    progress: Progress | None = None,
) -> Rewritten:
    """Write `source` into the folder `out` (which exists, normally a staged one), each tensor through its rule.

    rules: {stored name: rule}. A rule takes (name, tensor) and yields the (name, tensor) pairs that stand in its
    place; None drops the tensor. Names without a rule are copied. extra: {new name: function that makes the tensor},
    written last. dtype: what floating tensors are cast to; when None a rule's results are cast to the dtype of the
    tensor they came from, and the rest stays as stored.

    Raises ValueError for a rule without a tensor or a name written twice, UserError when the disk is too small.
    """
    missing = sorted(rules.keys() - source.entries.keys())
    if missing:
        raise ValueError(f"rules for tensors that the checkpoint does not hold: {missing}")
    require_free_space(out, source.nbytes)
    copied: list[str] = []
    changed: list[str] = []
    dropped: list[str] = []
    if progress:
        progress.start("write weights", source.nbytes, "B")
    with ExitStack() as stack:
        files = {shard: stack.enter_context(FileIO(source.folder / shard)) for shard in source.shards}
        writer = ShardWriter(out, max_shard_size, header_reserve=_reserve(source))
        stack.enter_context(writer)
        for name in source.names:
            entry = source.entries[name]
            stored = source.dtype(name)
            cast = dtype if dtype is not None and stored.is_floating_point else stored
            if name in rules:
                rule = rules[name]
                (dropped if rule is None else changed).append(name)
                for new_name, tensor in rule(name, source.tensor(name)) if rule else ():
                    writer.add(new_name, tensor.to(cast) if tensor.is_floating_point() else tensor)
            elif cast != stored:
                changed.append(name)
                writer.add(name, source.tensor(name).to(cast))
            else:
                copied.append(name)
                writer.copy(name, entry.dtype, entry.shape, files[entry.shard], entry.offset, entry.nbytes)
            if progress:
                progress.advance(entry.nbytes)
        for name, make in (extra or {}).items():
            tensor = make()
            writer.add(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
        shards = writer.close()
    written = dtype
    if written is None:
        floating = [source.dtype(name) for name in source.names if source.dtype(name).is_floating_point]
        written = max(set(floating), key=floating.count) if floating else None
    write_config(out, config, written)
    if progress:
        progress.finish()
    return Rewritten(shards, writer.nbytes, tuple(copied), tuple(changed), tuple(dropped))


def _reserve(source: Checkpoint) -> int:
    """Room for a header as long as the source's own with some more; a function of the source alone."""
    return min(HEADER_RESERVE, 4096) + sum(len(name) + 96 for name in source.names)
