"""User text: plain text, JSONL and parquet files, folders of them, and hub datasets, read document by document.

A text file is one document; a row of JSONL, parquet or a hub dataset is one: a text, or a dialogue. Whatever is wrong
with it is a `UserError` that names file and line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from retrofit.checkpoint.full import machine_error
from retrofit.data.corpora import BUILT_IN, Split
from retrofit.data.dialogues import TOOLS, Dialogue, keys_of, parse_dialogue
from retrofit.data.folders import LINES, PARQUET, text_files
from retrofit.data.readers import json_lines, json_rows, plain_text, suffix_of
from retrofit.data.revision import commit_of
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import local_path
from retrofit.install import install_command
from retrofit.recipe.hub import is_model_or_dataset, is_name
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import OWN_SAMPLES, SYNTHETIC

HUB = "hub:"
MADE = (OWN_SAMPLES, SYNTHETIC)
"""Sources whose texts are new: nothing else holds them."""
OURS = (*BUILT_IN, *MADE)
"""Sources that are no path: a file or folder of such a name gets another kind."""
ALL = "all"
"""Stands for all kinds together in results."""
CHAT = "chat"
"""Stands for measured dialogues in results."""
HELD_OUT_EVERY = 10
_LONGEST_KIND = 80


class Row(NamedTuple):
    """One document. name: within its source. text: all of it, of a dialogue what its turns say."""

    name: str
    text: str
    dialogue: Dialogue | None = None


def rows(source: TextSource) -> Callable[[], Iterator[Row]]:
    """How to read the documents of a source; call the result once for each pass.

    A name is unique within its source: the path below a named folder, with the number of the row. All rows are texts,
    or all are dialogues.
    Raises UserError if the file or folder is missing or of an unknown kind, or an optional package is not installed.
    """
    if source.source.startswith(HUB):
        hub_dataset(source.source)
        load = _hub_loader(source)
        return lambda: _hub_rows(source, load)
    files = text_files(source.source)
    if any(suffix_of(file) == PARQUET for file in files):
        _require_pyarrow(files)
    root = local_path(source.source)
    base = root if root.is_dir() else root.parent
    return lambda: _one_form(
        row for file in files for row in _file_rows(file, file.relative_to(base).as_posix(), source.field)
    )


def holds_dialogues(source: TextSource) -> bool:
    """Whether the rows of a source are dialogues, by its first row. Raises what reading that raises."""
    if source.source in OURS:
        return False
    if source.source.startswith(HUB):
        return _hub_dialogues(source)
    suffix = suffix_of(text_files(source.source)[0])
    if suffix and suffix not in (*LINES, PARQUET):
        return False
    first = next(rows(source)(), None)
    return first is not None and first.dialogue is not None


@lru_cache
def _hub_dialogues(source: TextSource) -> bool:
    """Asked of the hub once."""
    first = next(rows(source)(), None)
    return first is not None and first.dialogue is not None


def _one_form(every: Iterator[Row]) -> Iterator[Row]:
    """The rows as they are; UserError where texts and dialogues are mixed."""
    first: Row | None = None
    for row in every:
        first = first or row
        if (row.dialogue is None) != (first.dialogue is None):
            raise UserError(
                "one source holds texts and dialogues",
                where=f"{shown(first.name)} and {shown(row.name)}",
                fix="put them into two folders, and name both",
            )
        yield row


def side(read: Callable[[], Iterator[Row]], split: Split, hub: bool) -> Iterator[Row]:
    """One side of user text: of a hub stream every tenth document is held out, otherwise the last tenth."""
    if split == "all":
        yield from read()
    elif hub:
        for number, row in enumerate(read(), 1):
            if (number % HELD_OUT_EVERY == 0) == (split == "held_out"):
                yield row
    else:
        total = sum(1 for _ in read())
        train = total - max(1, total // HELD_OUT_EVERY) if total > 1 else total
        yield from islice(read(), train) if split == "train" else islice(read(), train, None)


def hub_dataset(source: str) -> tuple[str, str | None]:
    """(dataset, configuration or None) of `hub:DATASET[:CONFIG]`; UserError when they are no names of the hub."""
    dataset, colon, config = source.removeprefix(HUB).partition(":")
    if not is_model_or_dataset(dataset) or (colon and not is_name(config)):
        raise UserError(
            f"`{source.removeprefix(HUB)}` is no dataset of the hub",
            where=f"text source `{source}`",
            fix="write hub:OWNER/NAME, or hub:OWNER/NAME:CONFIG",
        )
    return dataset, config if colon else None


def place_of(source: str) -> Path:
    """Where the path of a text source leads. Raises UserError for a path that no file system can hold, or a loop."""
    path = local_path(source)
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise UserError("the path is a loop of symbolic links", where=shown(source), fix="check the path") from None


def kind_of(source: str) -> str:
    """A short name for metrics: letters, digits, dot, dash and underscore only, and none of our own words."""
    if source in OURS:
        return source
    name = source.removeprefix(HUB) if source.startswith(HUB) else place_of(source).name
    kind = re.sub(r"[^\w.-]+", "-", name)[:_LONGEST_KIND]
    if not any(character.isalnum() for character in kind):
        return "text"
    return f"{kind}-text" if kind in (*OURS, ALL, CHAT) else kind


def _file_rows(file: Path, name: str, field: str) -> Iterator[Row]:
    suffix = suffix_of(file)
    if suffix == PARQUET:
        yield from _parquet_rows(file, name, field)
        return
    if suffix not in LINES:
        text = plain_text(file)
        objects = json_rows(text, field)
        if not objects:
            yield Row(name, text)
            return
        if suffix:
            raise UserError(
                f"the lines are JSON objects, not prose; their keys: {shown(', '.join(objects), 120)}",
                where=shown(file),
                fix="name the file .jsonl, and its rows are read as texts; `field:` names the key that holds the text",
            )
    keys: tuple[str, ...] | None = None
    for number, row in json_lines(file):
        keys = keys_of(row, field) if keys is None else keys
        yield _row(f"{name}:{number}", row, keys, field, f"{shown(file)}:{number}")


def _row(name: str, row: dict[str, object], keys: tuple[str, ...], field: str, where: str) -> Row:
    """keys: that hold the dialogues of its file; none for texts."""
    if not keys:
        return Row(name, _text_field(row, field, where))
    dialogue = parse_dialogue(row, keys, where)
    return Row(name, dialogue.transcript, dialogue)


def _parquet_rows(file: Path, name: str, field: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        types = {name: table.schema_arrow.field(name).type for name in names}
        keys = keys_of({name: [] if pa.types.is_nested(kind) else None for name, kind in types.items()}, field)
        if not keys and field not in names:
            raise _no_field(field, names, shown(file))
        number = 0
        columns = [*keys, *(name for name in names if name == TOOLS)] if keys else [field]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield _row(f"{name}:{number}", row, keys, field, f"{shown(file)}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"not a readable parquet file: {shown(error, 160)}", where=shown(file), fix="write it again"
        ) from None


def _hub_loader(source: TextSource) -> Callable[..., object]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            "hub datasets need the package `datasets`",
            where=f"text source `{shown(source.source)}`",
            fix=f"{install_command('datasets')}; or name other text: a file, a folder, {' or '.join(BUILT_IN)}",
        ) from error
    return load_dataset


def _hub_rows(source: TextSource, load_dataset: Callable[..., object]) -> Iterator[Row]:
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.errors import HTTPError

    dataset, config = hub_dataset(source.source)
    try:
        commit = commit_of(dataset)
        pinned = {"revision": commit} if commit else {}
        stream = load_dataset(dataset, config, split=source.split, streaming=True, **pinned)
        keys = None
        for number, row in enumerate(stream, 1):  # type: ignore[var-annotated, arg-type]
            keys = keys_of(row, source.field) if keys is None else keys
            yield _row(f"{dataset}:{number}", row, keys, source.field, f"{source.source}, row {number}")
    except (ValueError, OSError, HTTPError) as error:  # datasets' own errors derive from the first two
        raise machine_error(error, HF_HOME) or UserError(
            f"cannot read the dataset: {shown(str(error).splitlines()[0] if str(error) else type(error).__name__)}",
            where=f"text source `{shown(source.source)}`, split `{shown(source.split)}`",
            fix="check name, configuration (hub:DATASET:CONFIG), split, network and `hf auth login`",
        ) from error


def _text_field(row: Mapping[str, object], field: str, where: str) -> str:
    if field not in row:
        raise _no_field(field, list(row), where)
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"`{shown(field, 40)}` holds {type(value).__name__}, not text",
            where=where,
            fix="name the key that holds the text",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"half a character (the lone surrogate {shown(value[error.start])}) stands in `{shown(field, 40)}`",
            where=where,
            fix="write the text again with whole characters",
        ) from None
    return value


def _no_field(field: str, names: list[str], where: str) -> UserError:
    return UserError(
        f"no key `{shown(field, 40)}`; there are: {shown(', '.join(map(str, names[:20]))) or 'none'}",
        where=where,
        fix="set `field:` of the text source to the key that holds the text, or the turns of a dialogue",
    )


def _require_pyarrow(files: list[Path]) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        where = shown(next(file for file in files if suffix_of(file) == PARQUET))
        raise UserError(
            "parquet files need the package `pyarrow`", where=where, fix=install_command("pyarrow")
        ) from error
