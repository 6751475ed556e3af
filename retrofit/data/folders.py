"""Which files a text source names: one file, or the text files of a folder; what is left out of a folder is known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retrofit.data.readers import GZIP, suffix_of
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import local_path, require_regular

PLAIN = (".txt", ".text", ".md", ".markdown")
LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
SUFFIXES = (*PLAIN, *LINES, PARQUET)
"""Kinds of files that are read in a folder; the first two kinds compressed with gzip as well."""
# Plain text as well, but in a folder something that merely lies beside the text.
_PROSE = (".rst", ".tex", ".org", ".adoc", ".asciidoc", ".log", ".raw", ".tokens")
_CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".jsx", ".tsx", ".rb")
_MORE_CODE = (".php", ".pl", ".sh", ".lua", ".r", ".jl", ".scala", ".kt", ".swift", ".cs", ".sql", ".hs", ".ml", ".el")
MOST_ENTRIES = 250_000
"""Most files and folders that are looked at below one folder."""


@dataclass(frozen=True)
class Folder:
    """The text files below a folder in name order, and what was left out: hidden entries, links to folders, and files
    of other kinds by suffix."""

    files: tuple[Path, ...]
    hidden: int
    linked: tuple[str, ...]
    others: Counter[str]

    def left_out(self) -> str:
        """What was left out in words, "" for nothing."""
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden} hidden ({_entries(self.hidden)})")
        if self.linked:
            parts.append(f"links to folders ({', '.join(shown(name, 40) for name in self.linked[:3])})")
        if self.others:
            kinds = ", ".join(f"{count} {shown(kind, 20)}" for kind, count in self.others.most_common(5))
            parts.append(f"files of other kinds ({kinds})")
        return "; ".join(parts)


def text_files(source: str) -> list[Path]:
    """The file itself, or every text file below a folder in name order.

    Raises UserError for what is missing, no regular file, or of a kind that is not read as text.
    """
    root = local_path(source)
    if root.is_dir():
        found = walk(root)
        if not found.files:
            what = found.left_out()
            raise UserError(
                f"the folder holds no text{f'; left out: {what}' if what else ''}",
                where=shown(root),
                fix=f"put files ending in {', '.join(SUFFIXES)} into it",
            )
        return list(found.files)
    require_regular(
        root,
        missing=f"no such text file or folder: {shown(source)}",
        fix="check the path, or use python-docs, python-stdlib, self, or hub:DATASET",
    )
    _require_text(root)
    return [root]


def walk(root: Path) -> Folder:
    """The text files below a folder. Links to files are followed inside it (and to where the hub's cache keeps its
    files); links to folders are not.

    Raises UserError for links that lead out or nowhere, text files that are no regular files, folders that cannot be
    listed, and more than MOST_ENTRIES entries.
    """
    files: list[Path] = []
    linked: list[str] = []
    others: Counter[str] = Counter()
    hidden = 0
    for entry in _entries_below(root):
        if entry.name.startswith("."):
            hidden += 1
        elif entry.is_symlink() and entry.is_dir():
            linked.append(Path(entry.path).relative_to(root).as_posix())
        elif not entry.is_dir(follow_symlinks=False):
            file = Path(entry.path)
            if not _is_text(file):
                others[file.suffix.lower() or "without a suffix"] += 1
                continue
            local_path(file)
            if entry.is_symlink():
                _require_inside(file, root)
            require_regular(file)
            files.append(file)
    return Folder(tuple(sorted(files)), hidden, tuple(sorted(linked)), others)


def _entries_below(root: Path) -> Iterator[os.DirEntry[str]]:
    """Every entry below a folder; hidden folders and links are not entered."""
    folders, seen = [str(root)], 0
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MOST_ENTRIES:
                        raise UserError(
                            f"more than {MOST_ENTRIES:,} files and folders lie below it",
                            where=shown(root),
                            fix="join the texts into a few JSONL files, or name a smaller folder",
                        )
                    if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                        folders.append(entry.path)
                    yield entry
        except OSError as error:
            raise UserError(
                f"the folder cannot be listed: {error.strerror or error}", where=shown(folder), fix="make it readable"
            ) from None


def _is_text(file: Path) -> bool:
    suffix = suffix_of(file)
    return suffix in SUFFIXES and not (suffix == PARQUET and file.name.lower().endswith(GZIP))


def _require_inside(link: Path, root: Path) -> None:
    """UserError unless a link leads to a file of the folder, or of the hub cache that the folder is a snapshot of."""
    try:
        target, place = link.resolve(), root.resolve()
    except (OSError, RuntimeError):
        return  # a loop: `require_regular` says so
    blobs = place.parent.parent / "blobs" if place.parent.name == "snapshots" else place
    if not target.is_relative_to(place) and not target.is_relative_to(blobs):
        raise UserError(
            f"{shown(link.name)} is a link that leads out of the folder, to {shown(target)}",
            where=shown(link),
            fix="put the file itself into the folder, or name it as a text source of its own",
        )


def _require_text(file: Path) -> None:
    """UserError for a file whose name says that it is not plain text, JSONL or parquet."""
    suffix = suffix_of(file)
    if suffix == ".json":
        raise UserError(
            "a .json file is not read as text", where=shown(file), fix="write one JSON object a line and name it .jsonl"
        )
    if suffix and not _is_text(file) and suffix not in (*_PROSE, *_CODE, *_MORE_CODE):
        raise UserError(
            f"a {shown(suffix, 20)} file is not read as text",
            where=shown(file),
            fix=f"give {', '.join(SUFFIXES)}; if it holds plain text, name it .txt",
        )


def _entries(count: int) -> str:
    return "a name that starts with a dot" if count == 1 else "names that start with a dot"
