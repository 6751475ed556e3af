"""What must be true of a folder before any of it leaves this machine. Nothing here uses the network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from retrofit.checkpoint.provenance import FILE, digest, read_provenance
from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import GateError, UserError
from retrofit.escape import shell_word, shown
from retrofit.files import read_text
from retrofit.publishing.identity import completed, require_identity
from retrofit.publishing.snippet import front_matter, placeholders, shows_snippet

CARD = "README.md"
PARTIAL = f".{CARD}.partial"
"""A card that is being written; a kill may leave it."""


@dataclass(frozen=True)
class Finished:
    """A folder that may be published: its card, license and the files that make it up (relative, sorted)."""

    folder: Path
    card: str
    license: str
    files: tuple[str, ...]
    nbytes: int


def require_finished(folder: str | Path, *, stated: Mapping[str, str] | None = None) -> Finished:
    """Check that the folder is a whole checkpoint whose gate and reload passed and whose files are those recorded.

    stated: license and base model (`identity.KEYS`) for a card that has none; the file is not changed here.

    Raises UserError: no retrofit.json, gate or reload not passed, a file changed, missing or added since, something
    that is no plain file, a card with placeholders, without a license or base model, or with other load lines than
    those executed.
    GateError when a requirement was not met or never checked.
    """
    folder = Path(folder)
    record = read_provenance(folder)
    _require_plain(folder)
    Checkpoint.open(folder)
    _require_gate(record, folder)
    if not (record.get("reload") or {}).get("passed"):
        raise UserError("the folder was never loaded again by a fresh process", where=str(folder), fix=_again(folder))
    _require_files(record, folder)
    if not (folder / CARD).is_file():
        raise UserError("the folder has no card", where=str(folder / CARD), fix=_again(folder))
    card = read_text(folder / CARD)
    if not shows_snippet(card):
        raise UserError(
            "the card does not show the lines that a fresh process executed",
            where=str(folder / CARD),
            fix=_again(folder),
        )
    stated = stated or {}
    card = completed(card, stated, str(folder / CARD))
    left = placeholders(card, _names(record) | {*stated.values(), *_names(front_matter(card).get("base_model"))})
    if left:
        raise UserError(
            f"the card has placeholders ({'; '.join(left[:5])})", where=str(folder / CARD), fix="write the values there"
        )
    files = tuple(sorted({*record["files"], CARD, FILE}))
    nbytes = sum((folder / name).stat().st_size for name in files)
    return Finished(folder, card, require_identity(card, str(folder / CARD)), files, nbytes)


def require_stated(folder: Path, stated: Mapping[str, str]) -> None:
    """UserError where neither the folder's card nor `stated` names license and base model. `require_finished` looks at
    all the rest."""
    if (folder / CARD).is_file():
        where = str(folder / CARD)
        require_identity(completed(read_text(folder / CARD), stated, where), where)


def _again(folder: Path) -> str:
    """What to type for a folder that is whole again."""
    run = folder.parent
    if (run / "recipe.yaml").is_file():
        return f"write the folder again: retrofit run {shell_word(run)} --from publish"
    return f"prove it and write its card: retrofit certify {shell_word(folder)}"


def _names(record: object) -> set[str]:
    """Every text of the record, and the last part of every path: names of a user's own, whatever they look like."""
    if isinstance(record, dict):
        return _names(list(record)) | _names(list(record.values()))
    if isinstance(record, list):
        return set().union(*map(_names, record))
    return {record, PurePath(record).name} if isinstance(record, str) else set()


def _require_gate(record: dict[str, Any], folder: Path) -> None:
    """Every requirement of the recipe was checked and met."""
    results = {result.get("metric"): result for result in record.get("gate") or ()}
    required = (record.get("recipe") or {}).get("require") or {}
    unmet = sorted(
        {name for name, result in results.items() if result.get("passed") is not True}
        | required.keys() - results.keys()
    )
    if unmet:
        raise GateError(
            f"requirements of the recipe are not met: {', '.join(map(str, unmet))}",
            where=str(folder / FILE),
            fix="run the recipe again until its `require` holds",
        )


def _require_plain(folder: Path) -> None:
    """Nothing but files and the folders that hold them: no link, which would publish what it points to."""
    inside = [Path(place) / name for place, folders, files in os.walk(folder) for name in (*folders, *files)]
    holding = {parent for path in inside if path.is_file() for parent in path.parents}
    odd = [
        path.relative_to(folder)
        for path in inside
        if path.is_symlink()
        or (path.name.startswith(".") and path.name != PARTIAL)
        or not (path.is_file() or path in holding)
    ]
    if odd:
        raise UserError(
            f"{', '.join(shown(path, 60) for path in sorted(odd)[:5])}: not part of the published checkpoint",
            where=str(folder),
            fix="remove what does not belong there",
        )


def _require_files(record: dict[str, Any], folder: Path) -> None:
    recorded = record.get("files")
    if not recorded:
        raise UserError(f"{FILE} records no files", where=str(folder / FILE), fix=_again(folder))
    present = digest(folder, everything=True)
    for problem, names in {
        "missing": recorded.keys() - present.keys(),
        "changed since it was measured": {n for n in recorded.keys() & present.keys() if recorded[n] != present[n]},
        "not part of the published checkpoint": present.keys() - recorded.keys(),
    }.items():
        if names:
            raise UserError(
                f"{', '.join(sorted(names))}: {problem}",
                where=str(folder),
                fix="remove what does not belong there" if "not part" in problem else _again(folder),
            )
