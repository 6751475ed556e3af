"""Where a command of one step writes: refused before any work when something stands in the way.

A result says which question it answers (`QUESTION`): the same command finds it done, and does nothing again. What
another command wrote is replaced by `--overwrite` alone, and what somebody else wrote or changed never: the record of a
checkpoint holds the digests of its files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from retrofit.checkpoint.provenance import FILE, digest, sha256
from retrofit.checkpoint.staging import require_writable
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.schema import Convert

QUESTION = "question"
FILES = "files"
_ANOTHER = "remove it, give another --out, or add --overwrite to replace what this program wrote there"


def work_folder(out: Path) -> Path:
    """Where a command keeps what it resumes from: beside its output, or beside what a link of that name points to."""
    out = out.resolve()
    return out.with_name(f"{out.name}.work")


def require_new(out: Path, *, overwrite: bool) -> bool:
    """UserError unless `out` can become a checkpoint folder. True where it is one that this program finished, by a
    command that `done_before` may know.

    overwrite: one that this program wrote may be there, as it was written and with nothing else in it.
    """
    require_writable(out)
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    record = _record(out)
    if record is None:
        raise UserError(
            "the output folder exists and is not empty", where=shown(out), fix="remove it, or give another --out"
        )
    if overwrite:
        _require_only_ours(out, record)
        return False
    if QUESTION not in record:
        raise _taken(out)
    return True


def done_before(out: Path, question: str) -> dict[str, Any]:
    """What the last step of the finished checkpoint `out` recorded. UserError unless `question` was asked, and where
    its configuration or weights are not what was written."""
    from retrofit.checkpoint.read import Checkpoint

    Checkpoint.open(out)
    record = answer_of(out, question)
    return {**record["steps"][-1]["result"], "notes": [f"done before: {shown(out)} is this command's, and is kept"]}


def answer_of(out: Path, question: str, *, everything: bool = False) -> dict[str, Any]:
    """The record of the folder `out`. UserError unless `question` was asked, and where configuration or weights
    (everything: any file) are not what was written."""
    record = _record(out)
    written = record.get(FILES) if record is not None and record.get(QUESTION) == question else None
    if record is None or not isinstance(written, dict):
        raise _taken(out)
    found = digest(out, everything=everything)
    for name in sorted(found.keys() | (written.keys() if everything else set())):
        if written.get(name) != found.get(name):
            raise UserError(
                f"this command wrote the output folder, and `{shown(name)}` was changed since",
                where=shown(out),
                fix="move the folder elsewhere to write it again, or give another --out",
            )
    return record


def require_same_or_new(out: Path, question: str | None, *, overwrite: bool) -> bool:
    """UserError unless `out` can become a folder beside the result of a command: it is new, this same command wrote it
    before it was stopped, or with `overwrite` another one did. True where it holds something that is replaced."""
    if require_new(out, overwrite=overwrite):
        record = _record(out)
        if record is None or record.get(QUESTION) != question:
            raise _taken(out)
        _require_only_ours(out, record)
        return True
    return overwrite


def require_moments(folder: Path, section: Convert, out: Path, *, overwrite: bool) -> None:
    """UserError unless the conversion measures moments and `folder` can hold them beside the checkpoint `out`.

    overwrite: it may hold moments. They may be those of an interrupted call as well.
    """
    require_writable(folder)
    place, checkpoint = folder.resolve(), out.resolve()
    for taken in (checkpoint, checkpoint.with_name(f"{checkpoint.name}.work")):
        if place.is_relative_to(taken) or taken.is_relative_to(place):
            raise UserError(
                "moments and checkpoint are folders of their own, neither inside the other",
                where=f"--moments {shown(folder)}, --out {shown(out)}",
                fix=f"give for example --moments {shown(out)}-moments",
            )
    if not section.calibrates:
        raise UserError(
            f"the method `{section.method}` measures no moments", where="--moments", fix="leave out --moments"
        )
    from retrofit.kv_heads.calibrate import moments as stored

    stored.require_own(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite or work_folder(out).is_dir()):
        raise UserError(
            "the folder holds moments already",
            where=f"--moments {shown(folder)}",
            fix="give another folder, or add --overwrite",
        )


def require_file(out: Path, *, overwrite: bool) -> bool:
    """UserError unless `out` can become a file of token losses. True where it is one already, by a command that
    `require_same` may know. overwrite: a file may be there."""
    require_writable(out.parent)
    if out.suffix != ".npz":
        raise UserError(
            "token losses are kept in a .npz file", where=f"--out {shown(out)}", fix=f"write --out {shown(out)}.npz"
        )
    if not os.path.lexists(out):
        return False
    if not out.is_file():
        raise UserError("there is something else than a file", where=f"--out {shown(out)}", fix="give another --out")
    if overwrite:
        return False
    if question_of(out) is None:
        raise _file_taken(out)
    return True


def require_same(out: Path, question: str) -> None:
    """UserError unless the command `question` wrote the file of token losses `out`."""
    if question_of(out) != question:
        raise _file_taken(out)


def require_no_files(files: Iterable[Path]) -> None:
    """UserError where one of the files exists that a command writes beside its output."""
    for file in files:
        if os.path.lexists(file):
            raise _file_taken(file)


def question_of(losses: Path) -> str | None:
    """The question that a file of token losses answers; None for one that does not say, and for any other file."""
    from retrofit.evaluation.scoring.losses import TokenLosses

    try:
        question = TokenLosses.load(losses).meta.get(QUESTION)
    except UserError:
        return None
    return question if isinstance(question, str) else None


def recorded_step(out: Path, step: str) -> Mapping[str, Any] | None:
    """The settings of the last step that made the checkpoint `out`, where that is `step`."""
    last = ((_record(out) or {}).get("steps") or [{}])[-1]
    settings = last.get("config") if isinstance(last, dict) and last.get("step") == step else None
    return settings if isinstance(settings, dict) else None


def _record(out: Path) -> dict[str, Any] | None:
    """The record of a checkpoint folder that this program wrote."""
    path = out / FILE
    if path.is_symlink() or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("steps"), list):
        return None
    return record if record["steps"] or QUESTION in record else None  # GGUF files of a model that no step has changed


def _require_only_ours(out: Path, record: Mapping[str, Any]) -> None:
    """UserError unless the folder holds the files that its record names, as they were written, and nothing else."""
    written = record.get(FILES)
    if not isinstance(written, dict):
        raise UserError(
            f"{FILE} does not say which files this program wrote there",
            where=shown(out),
            fix="remove the folder, or give another --out",
        )
    folders = {str(parent) for name in written for parent in PurePath(name).parents}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        plain = not path.is_symlink()
        if name == FILE or (name in folders and plain and path.is_dir()):
            continue
        if name not in written:
            reason = "was not written by this program"
        elif not (plain and path.is_file()) or sha256(path) != written[name]:
            reason = "was changed after this program wrote it"
        else:
            continue
        raise UserError(
            f"`{shown(name)}` in the output folder {reason}",
            where=shown(out),
            fix="move it elsewhere, or give another --out",
        )


def _taken(out: Path) -> UserError:
    return UserError(
        "the output folder exists and is not empty: it holds the result of another command",
        where=shown(out),
        fix=_ANOTHER,
    )


def _file_taken(file: Path) -> UserError:
    return UserError("the file exists already", where=shown(file), fix="give another --out, or add --overwrite")
