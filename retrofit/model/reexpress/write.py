"""Writing a re-expressed checkpoint: one target tensor in memory at a time, with the source tensors it is made of."""

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
from retrofit.checkpoint.place import folder_lock, require_free_space, require_writable, staged
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.write import ShardWriter, copy_side_files, write_config
from retrofit.errors import UserError
from retrofit.model.gguf import cache_dir
from retrofit.model.load import load_tokenizer
from retrofit.model.reexpress.base import Reexpression

if TYPE_CHECKING:
    from retrofit.console import Progress

FORMAT = 1
"""Of what `cached` writes: raised when the same source would give other bytes."""

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
    progress: Progress | None = None,
) -> ReexpressReport:
    """Write the checkpoint `source` as `reexpression` says into the (existing, staged) folder `out`.

    dtype: of the written weights, by default that of most of the source's bytes. Raises UserError when the source lacks
    a tensor or holds one that the re-expression does not know, before anything is written, and for values beyond dtype.
    """
    started = time.monotonic()
    checkpoint = Checkpoint.open(source)
    stored = stored_names(reexpression, checkpoint)
    own = checkpoint.main_dtype
    assert own.is_floating_point  # `resolve` reads no other models
    written = dtype or own
    require_free_space(out, checkpoint.nbytes * written.itemsize // own.itemsize)
    if progress:
        progress.start(f"re-express as {reexpression.target}", len(reexpression.tensors), "tensors")
    held: dict[str, Tensor] = {}
    with ShardWriter(out, max_shard_size) as writer:
        for name, made in reexpression.tensors.items():
            held = {one: held[one] if one in held else checkpoint.tensor(stored[one]) for one in made.sources}
            tensor = made.make(*held.values())
            cast = narrowed(tensor, written, name)
            writer.add(name, (cast.clone() if cast is tensor else cast).contiguous())
            if progress:
                progress.advance(1)
        writer.close()
    write_config(out, reexpression.config(), written)
    copy_side_files(source, out)
    _keep_tokenizer_class(Path(source), out)
    if progress:
        progress.finish()
    return ReexpressReport(
        source=reexpression.source,
        target=reexpression.target,
        tensors=len(reexpression.tensors),
        nbytes=writer.nbytes,
        dtype=name_of(written),
        seconds=time.monotonic() - started,
        notes=notes_of(reexpression, name_of(written)),
    )


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


def cached(
    reexpression: Reexpression,
    source: Path,
    identity: Callable[[], Mapping[str, str]],
    *,
    weights: bool,
    progress: Progress | None,
) -> Path:
    """The folder in the cache that holds the re-expressed checkpoint, made if needed.

    identity: digests of the source's configuration and weights, which name the folder; without `weights` only
    configuration and tokenizer are written.
    """
    key = json.dumps([reexpression.target, sorted(identity().items())])
    name = f"reexpressed-{hashlib.sha256(key.encode()).hexdigest()[:24]}-{FORMAT}"
    final = cache_dir() / (name if weights else f"{name}-config")
    if final.is_dir():
        return final
    require_writable(final)
    with folder_lock(final), staged(final, overwrite=True) as partial:
        if weights:
            report = write(reexpression, source, partial, progress=progress)
        else:
            write_config(partial, reexpression.config(), json.loads((source / "config.json").read_text()).get("dtype"))
            copy_side_files(source, partial)
            _keep_tokenizer_class(source, partial)
        for card in _CARDS:
            if (source / card).is_file():
                (partial / card).write_bytes((source / card).read_bytes())
    if progress and weights:
        for note in report.notes:
            progress.note(note)
        progress.note(f"the re-expressed checkpoint is kept in {final}")
    return final


def _keep_tokenizer_class(source: Path, out: Path) -> None:
    """Name the tokenizer's class in tokenizer_config.json: without it, it follows from the model type, now another."""
    if not any((out / name).is_file() for name in _TOKENIZERS):
        return
    path = out / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = type(load_tokenizer(source)).__name__
    if name == "TokenizersBackend":
        name = "PreTrainedTokenizerFast"  # the name that older releases and other engines know
    if fields.get("tokenizer_class") in (name, f"{name}Fast"):
        return
    fields["tokenizer_class"] = name
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
