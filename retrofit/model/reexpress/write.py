"""Writing a re-expressed checkpoint: one target tensor in memory at a time, with the source tensors it is made of.

Shards that an interrupted call finished are kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.checkpoint.cast import narrowed
from retrofit.checkpoint.heap import give_back
from retrofit.checkpoint.provenance import sha256
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.side_files import (
    TOKENIZER,
    copy_side_files,
    portable_tokenizer,
    side_files,
    write_tokenizer,
)
from retrofit.checkpoint.staging import require_free_space
from retrofit.checkpoint.write import KEPT, ShardWriter, going_on, held, write_config
from retrofit.errors import UserError
from retrofit.files import read_json
from retrofit.model.cache import cache_dir, cached, sound
from retrofit.model.load import load_tokenizer, stored_dtype
from retrofit.model.reexpress.base import Made, Reexpression

if TYPE_CHECKING:
    from retrofit.console import Progress

FORMAT = 2
"""Of what `write` writes: raised when the same source would give other bytes."""

GIVE_BACK_BYTES = 16 << 20
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
_CARDS = ("README.md",)


@dataclass(frozen=True)
class ReexpressReport:
    """What was written. source, target: model types. nbytes: of the tensors. dtype: of the weights."""

    source: str
    target: str
    tensors: int
    nbytes: int
    dtype: str
    seconds: float
    notes: tuple[str, ...]


def write(
    reexpression: Reexpression,
    source: str | Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    resume: bool = False,
    progress: Progress | None = None,
) -> ReexpressReport:
    """Write the checkpoint `source` as `reexpression` says into the (existing, staged) folder `out`.

    dtype: of the written weights, by default that of most of the source's bytes. resume: `out` may hold what an earlier
    call with the same arguments left, whose whole shards are kept. Raises UserError when the source lacks
    a tensor or holds one that the re-expression does not know, before anything is written, and for values beyond dtype.
    """
    started = time.monotonic()
    checkpoint = Checkpoint.open(source)
    stored = stored_names(reexpression, checkpoint)
    own = checkpoint.main_dtype
    assert own.is_floating_point  # `resolve` reads no other models
    written = dtype or own
    size = checkpoint.nbytes * written.itemsize // own.itemsize
    require_free_space(out, size - (held(out) if resume else 0))

    def weights(resume: bool) -> int:
        if progress:
            progress.start(f"re-express as {reexpression.target}", len(reexpression.tensors), "tensors")
        read: dict[str, Tensor] = {}
        given_back = 0
        with ShardWriter(out, max_shard_size, resume=resume) as writer:
            if progress and writer.kept:
                progress.note(KEPT.format(writer.kept))
            for name, made in reexpression.tensors.items():
                read = {one: read[one] for one in made.sources if one in read}  # the others go before the next come
                for one in made.sources:
                    if one not in read:
                        read[one] = checkpoint.tensor(stored[one])
                writer.add(name, _made(made, read, written, name))
                if writer.nbytes - given_back >= GIVE_BACK_BYTES:
                    give_back()
                    given_back = writer.nbytes
                if progress:
                    progress.advance(1)
            writer.close()
        return writer.nbytes

    nbytes = going_on(weights, out, resume, progress)
    write_config(out, reexpression.config(), written)
    copy_side_files(source, out)
    _keep_tokenizer_class(Path(source), out)
    if progress:
        progress.finish()
    return ReexpressReport(
        source=reexpression.source,
        target=reexpression.target,
        tensors=len(reexpression.tensors),
        nbytes=nbytes,
        dtype=name_of(written),
        seconds=time.monotonic() - started,
        notes=notes_of(reexpression, name_of(written)),
    )


def _made(made: Made, read: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> Tensor:
    """A target tensor in memory of its own. read: its source tensors by name."""
    tensor = made.make(*(read[one] for one in made.sources))
    cast = narrowed(tensor, dtype, name)
    return (cast.clone() if cast is tensor else cast).contiguous()


def name_of(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def notes_of(reexpression: Reexpression, dtype: str) -> tuple[str, ...]:
    """What a person should know about a re-expression that is written in this dtype ("bfloat16")."""
    notes = [f"{reexpression.source} was re-expressed as {reexpression.target}: the same function, as another class"]
    if reexpression.folds and dtype not in ("float32", "float64"):
        notes.append(
            f"weights were multiplied into each other and rounded to {dtype} again; float32 rounds a millionth"
        )
    return (*notes, *reexpression.notes)


def stored_names(reexpression: Reexpression, checkpoint: Checkpoint) -> dict[str, str]:
    """{name in the source's class: name in this checkpoint} of every tensor that is needed."""
    needed = dict.fromkeys(name for made in reexpression.tensors.values() for name in made.sources)
    found = {name: _stored(name, reexpression.prefixes, checkpoint.entries) for name in needed}
    missing = sorted(name for name, place in found.items() if place is None)
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} tensors of `{reexpression.source}`, first `{missing[0]}`",
            where=str(checkpoint.folder),
            fix="download it again, or check that config.json belongs to these weights",
        )
    used = set(found.values())
    unknown = [name for name in checkpoint.names if name not in used and not name.endswith(reexpression.ignored)]
    if unknown:
        raise UserError(
            f"`{unknown[0]}` has no place in {reexpression.target} ({len(unknown)} such tensors)",
            where=str(checkpoint.folder / checkpoint.shard_of(unknown[0])),
            fix="give a plain language model, without added heads or adapters",
        )
    return {name: place for name, place in found.items() if place is not None}


def _stored(name: str, prefixes: tuple[tuple[str, str], ...], stored: Mapping[str, object]) -> str | None:
    others = [new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)]
    return next((one for one in (name, *others) if one in stored), None)


def reexpressed(
    reexpression: Reexpression,
    source: Path,
    identity: Callable[[], Mapping[str, str]],
    *,
    weights: bool,
    progress: Progress | None,
) -> Path:
    """The folder in the cache that holds the re-expressed checkpoint, made if needed.

    identity: digests of the source's configuration and weights, which name the folder together with those of the other
    files that it takes over; without `weights` only configuration and tokenizer are written. What a kill leaves is gone
    on from.
    """
    others = {name: sha256(source / name) for name in (*side_files(source), *_CARDS) if (source / name).is_file()}
    key = json.dumps([reexpression.target, sorted(identity().items()), sorted(others.items())])
    name = f"reexpressed-{hashlib.sha256(key.encode()).hexdigest()[:24]}-{FORMAT}"
    final = cache_dir() / (name if weights else f"{name}-config")
    if sound(final, progress):
        return final

    def make(folder: Path) -> None:
        if weights:
            write(reexpression, source, folder, resume=True, progress=progress)
        else:
            dtype = read_json(source / "config.json").get("dtype")
            write_config(folder, reexpression.config(), dtype)
            copy_side_files(source, folder)
            _keep_tokenizer_class(source, folder)
        for card in _CARDS:
            if (source / card).is_file():
                (folder / card).write_bytes((source / card).read_bytes())

    cached(final, make, unfinished=final.with_name(f"{final.name}.work") if weights else None, progress=progress)
    if progress and weights:
        for note in notes_of(reexpression, stored_dtype(final)):
            progress.note(note)
        progress.note(f"the re-expressed checkpoint is kept in {final}")
    return final


def _keep_tokenizer_class(source: Path, out: Path) -> None:
    """Name the tokenizer's class in tokenizer_config.json: without it, it follows from the model type, now another."""
    if not any((out / name).is_file() for name in _TOKENIZERS):
        return
    path = out / TOKENIZER
    fields = read_json(path) if path.is_file() else {}
    known = portable_tokenizer({**fields, "tokenizer_class": type(load_tokenizer(source)).__name__})
    if fields.get("tokenizer_class") not in (known["tokenizer_class"], f"{known['tokenizer_class']}Fast"):
        write_tokenizer(out, dict(sorted(known.items())))
