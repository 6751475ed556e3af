"""Stream a checkpoint through rules, a few tensors in memory at a time.

A tensor without a rule is copied as bytes inside the kernel, near the speed of `cp`; the next tensors that change are
read and computed by other threads meanwhile. They are written in the order of the source, whatever the threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.checkpoint.cast import narrowed
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.staging import require_free_space
from retrofit.checkpoint.threads import ahead, thread_count
from retrofit.checkpoint.write import HEADER_RESERVE, KEPT, ShardWriter, going_on, held, write_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from retrofit.console import Progress

MOST_AHEAD = 4  # tensors that are computed before they are written: memory is bounded by them

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
    made: Mapping[str, Callable[[], Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    resume: bool = False,
    progress: Progress | None = None,
) -> Rewritten:
    """Write `source` into the folder `out` (which exists, normally a staged one), each tensor through its rule.

    rules: {stored name: rule}. A rule takes (name, tensor) and yields the (name, tensor) pairs that stand in its
    place; None drops the tensor. Names without a rule are copied. made: {stored name: function that makes what stands
    in its place}; the stored tensor is not read. Both may be called by several threads at a time. dtype: what floating
    tensors are cast to; when None a rule's results are cast to the dtype of the tensor they came from, and the rest
    stays as stored; config.json then names the one of most bytes. resume: `out` may hold whole shards of an earlier
    call with the same arguments, which are kept.

    Raises ValueError for a rule without a tensor or a name written twice, UserError when the disk is too small and for
    values that the dtype cannot hold.
    """
    made = made or {}
    missing = sorted((rules.keys() | made.keys()) - source.entries.keys())
    if missing:
        raise ValueError(f"rules for tensors that the checkpoint does not hold: {missing}")
    require_free_space(out, source.nbytes - (held(out) if resume else 0))
    work = _Pass(source, Path(out), rules, made, dtype, max_shard_size, progress)
    rewritten = going_on(work.run, out, resume, progress)
    own = source.main_dtype
    write_config(out, config, dtype or (own if own.is_floating_point else None))
    return rewritten


@dataclass(frozen=True)
class _Pass:
    """One pass over the source's tensors."""

    source: Checkpoint
    out: Path
    rules: Mapping[str, Rule | None]
    made: Mapping[str, Callable[[], Tensor]]
    dtype: torch.dtype | None
    max_shard_size: str | int
    progress: Progress | None

    def run(self, resume: bool) -> Rewritten:
        source, progress = self.source, self.progress
        copied: list[str] = []
        changed: list[str] = []
        dropped: list[str] = []
        if progress:
            progress.start("write weights", source.nbytes, "B")
        with ExitStack() as stack:
            files = {shard: stack.enter_context(FileIO(source.folder / shard)) for shard in source.shards}
            writer = ShardWriter(self.out, self.max_shard_size, header_reserve=_reserve(source), resume=resume)
            stack.enter_context(writer)
            if progress and writer.kept:
                progress.note(KEPT.format(writer.kept))
            threads = thread_count(MOST_AHEAD)
            changing = stack.enter_context(closing(ahead(self._changed, filter(self._changes, source.names), threads)))
            for name in source.names:
                entry = source.entries[name]
                if name in self.rules and self.rules[name] is None:
                    dropped.append(name)
                elif self._changes(name):
                    changed.append(name)
                    for new_name, tensor in next(changing):
                        writer.add(new_name, tensor)
                else:
                    copied.append(name)
                    writer.copy(name, entry.dtype, entry.shape, files[entry.shard], entry.offset, entry.nbytes)
                if progress:
                    progress.advance(entry.nbytes)
            shards = writer.close()
        if progress:
            progress.finish()
        return Rewritten(shards, writer.nbytes, tuple(copied), tuple(changed), tuple(dropped))

    def _changes(self, name: str) -> bool:
        """Whether a tensor is computed anew: neither dropped nor copied."""
        if name in self.rules:
            return self.rules[name] is not None
        return name in self.made or self._target(name) != self.source.dtype(name)

    def _changed(self, name: str) -> list[tuple[str, Tensor]]:
        """What stands in the place of a stored tensor."""
        rule = self.rules.get(name)
        if rule is not None:
            return [(new, self._cast(tensor, name)) for new, tensor in rule(name, self.source.tensor(name))]
        tensor = self.made[name]() if name in self.made else self.source.tensor(name)
        return [(name, self._cast(tensor, name))]

    def _target(self, name: str) -> torch.dtype:
        stored = self.source.dtype(name)
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        return narrowed(tensor, self._target(name), name)


def _reserve(source: Checkpoint) -> int:
    """Room for a header as long as the source's own with some more; a function of the source alone."""
    return min(HEADER_RESERVE, 4096) + sum(len(name) + 96 for name in source.names)
