"""Paths and files that come from outside: checked before they are opened, read within limits.

Every name that a person types and every file of a folder that somebody else made goes through here, so that what a
file system can hold (devices, pipes, loops, names that are no text) is refused with a message.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from retrofit.errors import UserError
from retrofit.escape import shell_word, shown

MAX_TEXT_BYTES = 64 << 20
"""Largest file that is read whole as text or JSON, where the caller sets no other limit."""
MAX_NAME_BYTES = 255
SPARE_BYTES = 24
"""Longest thing that is put around an output's name while it is written, as in `.NAME.replaced.staging`."""
MAX_PATH_BYTES = 3500
"""Longest path of an output: what is written in it has names of its own, and 4,096 is the most in all."""
MAX_DEPTH = 200
"""Deepest nesting of JSON values. No file of a model comes near it; Python's own limit depends on the call stack."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def local_path(name: str | Path, *, where: str | None = None) -> Path:
    """The path that a person means: `~` expanded, and a name that a file system can hold.

    where: the option or key it was given by, for the message. Raises UserError for a home folder that is not there, a
    NUL or other text that is no file name, and a name that is too long.
    """
    text = str(name)
    place = where or shown(text)
    if not text.strip():
        raise UserError("the path is empty", where=where, fix="name a file or folder")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"the name is not valid UTF-8: {shown(text)}", where=place, fix="rename the file or folder"
        ) from None
    if "\0" in text:
        raise UserError(f"a file name holds no NUL character: {shown(text)}", where=place, fix="check the path")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"`{shown(text.split('/')[0])}` is nobody's home folder here", where=place, fix="write the whole path"
        ) from None
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"the path is too long: {shown(text)}", where=place, fix="use a shorter one") from None
        if error.errno == errno.ELOOP:
            raise UserError(f"the path is a loop of symbolic links: {shown(text)}", where=place) from None
    return path


def output_path(name: str | Path, *, where: str) -> Path:
    """The path of something to be written: as `local_path`, with room for the names that stand beside it meanwhile."""
    path = local_path(name, where=where)
    require_links(path, where=where)
    if not path.resolve().name:
        raise UserError(f"{shown(name)} is the root of the file system", where=where, fix="name a place below it")
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES - SPARE_BYTES or len(os.fsencode(path.absolute())) > MAX_PATH_BYTES:
        raise UserError(f"the name is too long: {shown(path.name, 60)}", where=where, fix="use a shorter one")
    return path


def require_links(path: Path, *, where: str) -> None:
    """UserError where a symbolic link on the way to `path`, or `path` itself, leads to nothing, or in a loop: nothing
    can be made there, and a loop cannot be followed."""
    for part in (path.absolute(), *path.absolute().parents):
        if os.path.lexists(part) and not os.access(part, os.F_OK):
            raise UserError(
                f"{shown(part.name)} is a symbolic link to something that is not there",
                where=where,
                fix="remove the link, or choose another place",
            )


def require_regular(path: Path, *, missing: str = "there is no such file", fix: str = "check the path") -> None:
    """UserError unless `path` is a regular file (links are followed) that can be read; says what it is instead."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            target = shown(path.readlink())
            what = (
                "is a loop of symbolic links"
                if error.errno == errno.ELOOP
                else f"links to {target}, which is not there"
            )
            raise UserError(f"{shown(path.name)} {what}", where=shown(path), fix=fix) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError("no permission to look at it", where=shown(path), fix="make it readable") from None
        raise UserError(missing, where=shown(path), fix=fix) from None
    except ValueError:
        raise UserError(missing, where=shown(path), fix=fix) from None
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "no regular file")
        raise UserError(f"{shown(path.name)} is {kind}, not a file", where=shown(path), fix=fix)
    if not os.access(path, os.R_OK):
        raise UserError(
            f"no permission to read {shown(path.name)}",
            where=shown(path),
            fix=f"make it readable: chmod u+r {shell_word(path)}",
        )


def require_size(path: Path, limit: int) -> None:
    """UserError when a file has more than `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise UserError(
            f"{shown(path.name)} has {size:,} bytes; more than {limit:,} are not read",
            where=shown(path),
            fix="check that it is the file that is meant",
        )


def read_bytes(path: Path, *, limit: int = MAX_TEXT_BYTES, missing: str = "there is no such file") -> bytes:
    """All bytes of a regular file of at most `limit` bytes; UserError otherwise."""
    require_regular(path, missing=missing)
    require_size(path, limit)
    return path.read_bytes()


def read_text(path: Path, *, limit: int = MAX_TEXT_BYTES, missing: str = "there is no such file") -> str:
    """The UTF-8 text of a regular file, without a byte order mark; UserError for another encoding, with its line."""
    raw = read_bytes(path, limit=limit, missing=missing)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{shown(path.name)} is not UTF-8 text", where=f"{shown(path)}:{line}", fix="save it as UTF-8"
        ) from None


def read_json(
    path: Path,
    *,
    limit: int = MAX_TEXT_BYTES,
    missing: str = "there is no such file",
    fix: str = "download the file again",
) -> dict[str, Any]:
    """The JSON object in a file; UserError for anything else, and for what no program could go on with."""
    return parse_json(read_text(path, limit=limit, missing=missing), shown(path.name), where=shown(path), fix=fix)


def parse_json(
    text: str | bytes, name: str, *, where: str | None = None, fix: str = "download the file again"
) -> dict[str, Any]:
    """The JSON object in a text. UserError for other values, a key given twice, lone surrogates and endless nesting."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
        _require_shallow(value)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{name} is nested too deeply", where=where, fix=fix) from None
    except UnicodeEncodeError:
        raise UserError(f"{name} holds half a character (a lone surrogate)", where=where, fix=fix) from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, too many digits, a key given twice
        raise UserError(f"{name} is not valid JSON ({shown(error, 160)})", where=where, fix=fix) from None
    if not isinstance(value, dict):
        raise UserError(f"{name} must hold a JSON object", where=where, fix=fix)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice, 60)!r} is given twice")
    return values


def _require_shallow(value: object) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
