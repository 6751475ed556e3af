"""The files that travel with the weights besides the configuration, by name; code, pickles and cards never do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import read_json

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
JSON = (TOKENIZER, "special_tokens_map.json", "added_tokens.json")
"""Small JSON objects that say how the tokenizer is used."""
TOKENS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""The tokenizer itself, and the template of its chats."""
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
SIDE_FILES = (GENERATION, *JSON, *TOKENS, *LICENSES)
SIDE_FOLDERS = ("additional_chat_templates",)
_BLOB = re.compile(r"[0-9a-f]{30,}")


def side_files(source: str | Path) -> tuple[str, ...]:
    """Names of a checkpoint's tokenizer, chat template, generation settings and license texts that are there, sorted;
    never weights, config.json, card or code.

    Raises UserError for a link to a file of another name elsewhere, whose content would be copied and published.
    """
    source = Path(source)
    templates = [path for folder in SIDE_FOLDERS for path in (source / folder).glob("*.jinja")]
    names = [name for name in SIDE_FILES if (source / name).is_file()]
    found = sorted(names + [path.relative_to(source).as_posix() for path in templates])
    for path in (source / part for part in (*found, *SIDE_FOLDERS)):
        _require_own(path, source)
    return tuple(found)


def _require_own(path: Path, source: Path) -> None:
    """A link is to something in the folder, to a file of the same name, or into a cache that names files by digest."""
    target = path.resolve()
    own = target.is_relative_to(source.resolve()) or target.name == path.name or _BLOB.fullmatch(target.name)
    if path.is_symlink() and not own:
        raise UserError(
            f"{shown(path.name)} links to {shown(target)}, which is no file of the model",
            where=shown(path),
            fix="put the model's own file there, or remove the link",
        )


def copy_side_files(source: str | Path, out: str | Path) -> tuple[str, ...]:
    """Copy what `side_files` names, the tokenizer's settings under names that all releases know; returns the names."""
    source, out = Path(source), Path(out)
    copied = side_files(source)
    for name in copied:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    if TOKENIZER in copied:
        settings = read_json(out / TOKENIZER)
        if (known := portable_tokenizer(settings)) != settings:
            write_tokenizer(out, known)
    return copied


def portable_tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json under names that transformers 4 knows as well as 5.

    4 has no class `TokenizersBackend`, and fails on a list of `extra_special_tokens`; 5 reads the older names alike.
    """
    known = dict(settings)
    if known.get("tokenizer_class") == "TokenizersBackend":
        known["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(known.get("extra_special_tokens"), list):
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
    return known


def write_tokenizer(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Write tokenizer_config.json, its keys in the order given."""
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (Path(folder) / TOKENIZER).write_text(text + "\n", encoding="utf-8")
