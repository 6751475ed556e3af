"""Bytes of a text file as text: encodings, gzip and lines, within limits, and file:line for what cannot be read."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import require_regular

GZIP = ".gz"
MAX_DOCUMENT = 1 << 30
"""Most bytes of one plain text, which is read whole."""
MAX_LINE = 1 << 27
"""Most bytes of one line of JSONL."""
FREE, RATIO = 1 << 26, 100
"""gzip: what unpacks to more than FREE bytes and RATIO times its own size is no text (prose shrinks to a third)."""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NO_TEXT = {
    b"%PDF-": "a PDF document",
    b"%!PS": "a PostScript document",
    b"{\\rtf": "an RTF document",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed with gzip",
    b"version https://git-lfs": "a pointer of git LFS; the text itself was not downloaded",
}
_LINE_ENDS = re.compile("\r\n|\r|\n")


def suffix_of(file: Path) -> str:
    """What a file's name says about its kind: the suffix in small letters, that below `.gz` for a compressed one."""
    name = file.name.lower()
    return Path(name.removesuffix(GZIP)).suffix


def plain_text(file: Path) -> str:
    """The whole text of a file, line ends as newlines, without a byte order mark.

    Raises UserError, with the line, for what is not text in UTF-8 (or, with its byte order mark, UTF-16 or UTF-32).
    """
    with _opened(file) as stream:
        size = MAX_DOCUMENT if file.name.lower().endswith(GZIP) else min(MAX_DOCUMENT, file.stat().st_size)
        data = _read(stream, file, size + 1)
    if len(data) > MAX_DOCUMENT:
        raise UserError(
            f"one text of more than {MAX_DOCUMENT:,} bytes", where=shown(file), fix="split it into several files"
        )
    data, encoding = _start(data, file)
    line = 1
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line += data[: error.start].decode(encoding, "ignore").count("\n")
        raise _not_unicode(file, line, encoding) from None
    if "\0" in text:
        raise _binary(file, text[: text.index("\0")].count("\n") + 1)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line, its end left out. Raises UserError as `plain_text` does."""
    with _opened(file) as stream:
        head, encoding = _start(_read(stream, file, 64), file)
        number, looked, rest = 0, 0, bytearray(head)
        newline = "\n".encode(encoding)
        while True:
            data = _read(stream, file, 1 << 20)
            rest += data
            whole = _cut(rest, newline, looked) if data else bytes(rest)
            looked = max(0, len(rest) - len(newline) + 1)
            if not data and not whole:
                return
            for line in _decoded(whole, encoding, file, number):
                number += 1
                yield number, line
            if not data:
                return
            if len(rest) > MAX_LINE:
                raise UserError(
                    f"a line of more than {MAX_LINE:,} bytes", where=f"{shown(file)}:{number + 1}", fix="check the file"
                )


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, object) of every line of a JSONL file that is not blank. Raises UserError with file:line."""
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        where = f"{shown(file)}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"not a JSON object: {error.msg}", where=where, fix="correct the line") from None
        except RecursionError:
            raise UserError("not a JSON object: nested too deeply", where=where, fix="correct the line") from None
        except ValueError as error:  # a number with too many digits
            raise UserError(f"not a JSON object: {shown(error, 120)}", where=where, fix="correct the line") from None
        if not isinstance(row, dict):
            raise UserError("a line must be a JSON object", where=where, fix='write {"text": "..."} a line')
        yield number, row


def json_rows(text: str, field: str) -> list[str]:
    """The keys of the rows where a text is rows of JSON, else none: its first two lines are objects, or its only one is
    an object with the key `field`."""
    if not text.lstrip().startswith("{"):
        return []
    first = [line for line in text.split("\n", 50)[:50] if line.strip()][:2]
    try:
        rows = [json.loads(line) for line in first]
    except (ValueError, RecursionError):
        return []
    if not all(isinstance(row, dict) for row in rows) or (len(rows) == 1 and field not in rows[0]):
        return []
    return list(rows[0])


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where its name ends in .gz."""
    require_regular(file)
    with file.open("rb") as raw:
        if not file.name.lower().endswith(GZIP):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield unpacked  # type: ignore[misc]


def _read(stream: BinaryIO, file: Path, size: int) -> bytes:
    """At most `size` bytes; UserError for what cannot be read or unpacks without an end."""
    packed = isinstance(stream, gzip.GzipFile)
    most = max(FREE, RATIO * file.stat().st_size) if packed else size
    try:
        data = stream.read(min(size, max(0, most - stream.tell()) + 1) if packed else size)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot be unpacked: {shown(error, 120)}", where=shown(file), fix="compress it again with gzip"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or error}", where=shown(file), fix="check the file and its disk"
        ) from None
    if packed and stream.tell() > most:
        raise UserError(
            f"{file.stat().st_size:,} bytes unpack to more than {most:,}: that is no text",
            where=shown(file),
            fix="check the file; if it is what is meant, give it unpacked",
        )
    return data


def _start(data: bytes, file: Path) -> tuple[bytes, str]:
    """(the bytes without a byte order mark, their encoding). UserError where they begin as another kind of file."""
    for mark, what in _NO_TEXT.items():
        if data.startswith(mark):
            raise UserError(f"this is {what}", where=shown(file), fix="give plain text")
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :], encoding
    return data, "utf-8"


def _cut(data: bytearray, newline: bytes, start: int) -> bytes:
    """Take off what ends with the last newline that begins at `start` or later; in UTF-16 and UTF-32 it starts at a
    whole character. What came before `start` was looked at already: a long line is read once."""
    at = data.rfind(newline, start)
    while at >= 0 and at % len(newline):
        at = data.rfind(newline, start, at + len(newline) - 1)
    end = at + len(newline) if at >= 0 else 0
    whole = bytes(data[:end])
    del data[:end]
    return whole


def _decoded(data: bytes, encoding: str, file: Path, before: int) -> list[str]:
    """The lines of some bytes that end with a line or with the file. before: lines that came before."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        good = data[: error.start].decode(encoding, "ignore")
        raise _not_unicode(file, before + len(_LINE_ENDS.findall(good)) + 1, encoding) from None
    if "\0" in text:
        raise _binary(file, before + len(_LINE_ENDS.findall(text[: text.index("\0")])) + 1)
    lines = _LINE_ENDS.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def _not_unicode(file: Path, line: int, encoding: str) -> UserError:
    name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
    return UserError(f"not {name} text", where=f"{shown(file)}:{line}", fix="save the file as UTF-8")


def _binary(file: Path, line: int) -> UserError:
    return UserError(
        "a NUL character: this is binary data, or UTF-16 without its byte order mark",
        where=f"{shown(file)}:{line}",
        fix="give plain text in UTF-8",
    )
