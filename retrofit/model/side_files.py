"""The files beside the weights that other people write: a tokenizer's and the settings of generation.

They are read within limits before another library parses them, and a loaded tokenizer is checked against its model.
"""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from retrofit.checkpoint.config import finite, is_number
from retrofit.checkpoint.side_files import GENERATION, JSON, TOKENIZER, TOKENS
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import read_json, require_regular, require_size

_MOST_BYTES = 16 << 20
_MOST_BYTES_LARGE = 256 << 20
_FIX = "download the file again"


def require_side_files(folder: str | Path) -> None:
    """Raises UserError for a side file that is no regular file, too large, no JSON object where it should be one, or
    that begins with a byte order mark."""
    for name in TOKENS:
        path = Path(folder) / name
        if os.path.lexists(path):
            require_regular(path, fix=_FIX)
            require_size(path, _MOST_BYTES_LARGE)
            require_no_mark(path)
    for name in (GENERATION, *JSON):
        side_file(folder, name)
        if os.path.lexists(path := Path(folder) / name):
            require_no_mark(path)


def require_no_mark(path: Path) -> None:
    """UserError for a file that begins with a byte order mark: transformers fails on it, leaves the file out, or takes
    the mark for a character of a template or a vocabulary."""
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            raise UserError(
                f"{path.name} begins with a byte order mark, which transformers does not expect",
                where=shown(path),
                fix="save it as UTF-8 without the mark",
            )


def side_file(folder: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in a side file, {} where the folder has none. UserError for anything else."""
    path = Path(folder) / name
    if not os.path.lexists(path):
        return {}
    settings = read_json(path, limit=_MOST_BYTES)
    if not finite(settings):
        raise UserError(f"{name} holds a number that is not finite", where=shown(path), fix=_FIX)
    return settings


def require_usable(tokenizer: Any, vocabulary: int | None, where: str) -> None:
    """Raises UserError for a tokenizer that cannot encode, or whose ids are not the model's.

    vocabulary: tokens of the model, None where the tokenizer stands alone. Tokens that were added to a vocabulary may
    lie beyond it, as long as no text holds them; those that open and close a text may not.
    """
    limit = tokenizer.model_max_length
    if not is_number(limit):
        raise UserError(
            f"model_max_length is {shown(repr(limit), 60)}, not a number of tokens",
            where=f"{where}: {TOKENIZER}",
            fix="write the number of tokens the model was trained with, or remove it",
        )
    tokenizer.encode("a b", add_special_tokens=False)
    if vocabulary is None:
        return
    added = tokenizer.added_tokens_decoder
    largest = max((index for index in tokenizer.get_vocab().values() if index not in added), default=0)
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer has ids up to {largest}, and the model {vocabulary} tokens",
            where=where,
            fix="put the tokenizer that belongs to the model into the folder",
        )
    for name in ("bos_token", "eos_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None and not 0 <= index < vocabulary:
            raise UserError(
                f"the {name} `{shown(getattr(tokenizer, name), 60)}` has the id {index}, and the model {vocabulary} "
                "tokens",
                where=f"{where}: {TOKENIZER}",
                fix=f"name a {name} that the model's vocabulary holds, or remove the field",
            )
