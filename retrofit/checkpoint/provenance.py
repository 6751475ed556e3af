"""retrofit.json: where a checkpoint comes from and what was done to it.

The keys have one order and the file holds no clock of its own, so the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from retrofit.checkpoint.files import checkpoint_files
from retrofit.checkpoint.threads import each_alone
from retrofit.errors import UserError
from retrofit.escape import json_text, shown
from retrofit.files import read_json
from retrofit.install import update_command

FILE = "retrofit.json"
SCHEMA_VERSION = 1
# First what a reader wants to know; the rest of the record follows by name.
KEY_ORDER = ("schema_version", "name", "source", "recipe", "steps", "metrics", "gate", "reload", "versions", "files")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("source", "recipe", "metrics", "reload", "versions", "files"), dict),
    **dict.fromkeys(("steps", "gate"), list),
}
PACKAGES = (
    "attention-retrofit",
    "accelerate",
    "huggingface_hub",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in small pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(paths: Iterable[str | Path]) -> list[str]:
    """SHA-256 of files, in their order, by several threads."""
    return each_alone(sha256, paths)


def digest(folder: str | Path, *, everything: bool = False) -> dict[str, str]:
    """{file name: sha256} of config.json and the weights; with `everything` of all files but README.md and
    retrofit.json (a card may be edited by hand and is checked for itself)."""
    folder = Path(folder)
    if everything:
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        names = sorted(path.relative_to(folder).as_posix() for path in files)
        names = [name for name in names if name not in (FILE, "README.md")]
    else:
        names = list(checkpoint_files(folder))
    return dict(zip(names, sha256_of(folder / name for name in names), strict=True))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about numbers or bytes, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_provenance(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write retrofit.json (with the schema version) and return its path.

    Raises ValueError when the record holds NaN, infinity or something that JSON cannot hold.
    """
    content = {**record, "schema_version": SCHEMA_VERSION}
    ordered = {key: content[key] for key in KEY_ORDER if key in content}
    ordered.update({key: content[key] for key in sorted(content.keys() - ordered.keys())})
    canonical = {key: json.loads(json.dumps(value, sort_keys=True, allow_nan=False)) for key, value in ordered.items()}
    path = Path(folder) / FILE
    path.write_text(json_text(json.dumps(canonical, indent=2, ensure_ascii=False)) + "\n", encoding="utf-8")
    return path


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """The record of a folder. Raises UserError when there is none, by a newer version, or by something else."""
    path = Path(folder) / FILE
    record = read_json(path, missing="the folder holds no retrofit.json, so it was not written by `retrofit run`")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"retrofit.json has schema version {record.get('schema_version')}, and this program reads {SCHEMA_VERSION}",
            where=str(path),
            fix=f"update: {update_command()}",
        )
    _require_shape(record, path)
    try:
        json.dumps(record, allow_nan=False)
    except ValueError:  # Python reads NaN and Infinity, which are no JSON
        raise _not_ours("it holds a number that is not finite", path) from None
    return record


def _require_shape(record: Mapping[str, Any], path: Path) -> None:
    """UserError for a record that no command of ours wrote: readers rely on what is an object and what a list."""
    for key, kind in _KINDS.items():
        if record.get(key) is not None and not isinstance(record[key], kind):
            raise _not_ours(f"`{key}` is no {'object' if kind is dict else 'list'}", path)
    for step in record.get("steps") or ():
        if not isinstance(step, dict) or not isinstance(step.get("step"), str):
            raise _not_ours("`steps` holds something that is no step", path)
        for key in ("config", "result"):
            if not isinstance(step.get(key) or {}, dict):
                raise _not_ours(f"the step `{shown(step['step'], 60)}` has a {key} that is no object", path)
        read = step.get("read") or {}
        if not isinstance(read, dict) or not all(_are_texts(kinds) for kinds in read.values()):
            raise _not_ours(f"the step `{shown(step['step'], 60)}` has read something that is no kind of text", path)
    if not all(isinstance(result, dict) for result in record.get("gate") or ()):
        raise _not_ours("`gate` holds something that is no result", path)
    if not all(isinstance(value, str) for value in (record.get("files") or {}).values()):
        raise _not_ours("`files` holds something that is no digest", path)


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _not_ours(what: str, path: Path) -> UserError:
    return UserError(
        f"retrofit.json is no record of this program: {what}",
        where=shown(path),
        fix="remove the file, and the folder is read as anybody's checkpoint; or write the folder again",
    )
