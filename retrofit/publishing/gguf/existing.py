"""What a GGUF file is that stands where another is to be written: it is never trusted and never replaced, and the error
says whose it seems to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.gguf_file import header_of
from retrofit.publishing.gguf.checking import other_vocabulary

if TYPE_CHECKING:
    from retrofit.model.folder import ModelFolder


def require_no_files(folder: Path, model: ModelFolder, *, ours: Sequence[str] = ()) -> None:
    """UserError for a GGUF file in `folder` that is not one of `ours`, which says what it is beside `model`."""
    for path in sorted(folder.glob("*.gguf")):
        if path.name not in ours:
            raise UserError(
                f"`{shown(path.name)}` is there already, and this program did not write it: {described(path, model)}",
                where=shown(folder),
                fix="move it elsewhere, or give another --out",
            )


def described(path: Path, model: ModelFolder) -> str:
    """Whose file it seems to be, by its header alone."""
    try:
        metadata = header_of(path).metadata
    except (UserError, OSError) as error:
        return f"it cannot be read ({error.what if isinstance(error, UserError) else error.strerror})"
    found = next(_differences(metadata, model), None)
    return found or "a file of such a model, whose weights may be others"


def _differences(metadata: Mapping[str, Any], model: ModelFolder) -> Iterator[str]:
    spec, name = model.spec, metadata.get("general.architecture")
    sizes = {
        "block_count": ("layers", len(spec.layers)),
        "embedding_length": ("values a token", spec.hidden_size),
        "attention.head_count": ("query heads", spec.layers[0].query_heads),
        "attention.head_count_kv": ("KV heads", spec.layers[0].kv_heads),
        "context_length": ("positions", spec.max_position_embeddings),
    }
    for key, (what, wanted) in sizes.items():
        found = metadata.get(f"{name}.{key}")
        if isinstance(found, int) and found != wanted:
            yield f"a file of another model, with {found:,} {what}, where this folder has {wanted:,}"
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        yield "a file without a tokenizer"
        return
    tokenizer = model.tokenizer
    other = other_vocabulary(
        [str(token) for token in tokens], tokenizer.get_vocab(), frozenset(tokenizer.get_added_vocab()), spec.vocab_size
    )
    if other is not None:
        yield f"a file of another tokenizer; it has {other}"
