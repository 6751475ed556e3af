"""User text: plain text, JSONL and parquet files, folders of them, and hub datasets, read document by document.

A text file is one document; a row of JSONL, parquet or a hub dataset is one. Whatever is wrong with the text is a
`UserError` that names file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from retrofit.errors import UserError
from retrofit.recipe.hub import is_model_or_dataset, is_name
from retrofit.recipe.schema import TextSource

HUB = "hub:"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")

Row = tuple[str, str]  # (name, text)


def rows(source: TextSource) -> Callable[[], Iterator[Row]]:
    """How to read the documents of a source; call the result once for each pass.

    Raises UserError if the file or folder is missing or of an unknown kind, or an optional package is not installed.
    """
    if source.source.startswith(HUB):
        hub_dataset(source.source)
        load = _hub_loader()
        return lambda: _hub_rows(source, load)
    files = text_files(source.source)
    if any(file.suffix == ".parquet" for file in files):
        _require_pyarrow(files)
    return lambda: (row for file in files for row in _file_rows(file, source.field))


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


def text_files(path: str) -> list[Path]:
    """The file itself, or every text file below a folder in name order."""
    root = Path(path).expanduser()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UserError(
                "the folder holds no text", where=str(root), fix=f"put files ending in {', '.join(SUFFIXES)} into it"
            )
        return files
    if not root.exists():
        raise UserError(
            f"no such text file or folder: {path}",
            where=f"text source `{path}`",
            fix="check the path, or use python-docs, python-stdlib, self, or hub:DATASET",
        )
    if root.suffix == ".json":
        raise UserError(
            "a .json file is not read as text", where=str(root), fix="write one JSON object a line and name it .jsonl"
        )
    return [root]


def kind_of(source: str) -> str:
    """A short name for metrics: letters, digits, dot, dash and underscore only."""
    name = source.removeprefix(HUB) if source.startswith(HUB) else Path(source).expanduser().resolve().name
    return re.sub(r"[^\w.-]+", "-", name)


def _file_rows(file: Path, field: str) -> Iterator[Row]:
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, field)
    elif file.suffix == ".jsonl":
        yield from _jsonl_rows(file, field)
    else:
        try:
            yield file.name, file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(file, error) from error


def _jsonl_rows(file: Path, field: str) -> Iterator[Row]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"not a JSON object: {error.msg}", where=where, fix="correct the line") from error
                if not isinstance(row, dict):
                    raise UserError("a line must be a JSON object", where=where, fix='write {"text": "..."} a line')
                yield f"{file.name}:{number}", _text_field(row, field, where)
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error


def _parquet_rows(file: Path, field: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"not a readable parquet file: {error}", where=str(file), fix="write it again") from error
    if field not in table.schema_arrow.names:
        raise _no_field(field, table.schema_arrow.names, str(file))
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[field]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield f"{file.name}:{number}", _text_field({field: value}, field, f"{file}, row {number}")


def _hub_loader() -> Callable[..., object]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            "hub datasets need the package `datasets`", where="text source `hub:...`", fix="pip install datasets"
        ) from error
    return load_dataset


def _hub_rows(source: TextSource, load_dataset: Callable[..., object]) -> Iterator[Row]:
    from huggingface_hub.errors import HTTPError

    dataset, config = hub_dataset(source.source)
    try:
        stream = load_dataset(dataset, config, split=source.split, streaming=True)
        for number, row in enumerate(stream, 1):  # type: ignore[var-annotated, arg-type]
            yield f"{dataset}:{number}", _text_field(row, source.field, f"{source.source}, row {number}")
    except (ValueError, OSError, HTTPError) as error:  # datasets' own errors derive from the first two
        raise UserError(
            f"cannot read the dataset: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=f"text source `{source.source}`, split `{source.split}`",
            fix="check name, configuration (hub:DATASET:CONFIG), split, network and `hf auth login`",
        ) from error


def _text_field(row: dict[str, object], field: str, where: str) -> str:
    if field not in row:
        raise _no_field(field, list(row), where)
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"`{field}` holds {type(value).__name__}, not text", where=where, fix="name the key that holds the text"
        )
    return value


def _no_field(field: str, names: list[str], where: str) -> UserError:
    return UserError(
        f"no key `{field}`; there are: {', '.join(map(str, names)) or 'none'}",
        where=where,
        fix="set `field:` of the text source to the key that holds the text",
    )


def _not_utf8(file: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"not UTF-8 text (byte {error.start})", where=str(file), fix="save the file as UTF-8")


def _require_pyarrow(files: list[Path]) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        where = str(next(file for file in files if file.suffix == ".parquet"))
        raise UserError("parquet files need the package `pyarrow`", where=where, fix="pip install pyarrow") from error
