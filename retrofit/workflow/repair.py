"""`retrofit certify --repair`: the names that saving with transformers 5 drops are written again, from what is there.

A fine-tune loads the folder and saves it: `rope_parameters` stays, and with it what transformers 5 computes; the older
names, which transformers 4 and other engines look for, are gone. config.json and tokenizer_config.json are written as
every command writes them; weights are never opened.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import CONFIG, read_config
from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.provenance import FILE, digest, read_provenance, write_provenance
from retrofit.checkpoint.side_files import TOKENIZER, portable_tokenizer, write_tokenizer
from retrofit.checkpoint.staging import put_file, require_writable
from retrofit.checkpoint.write import write_config
from retrofit.context.names import OLDER, portable
from retrofit.context.rope import Finding, lint_folder, require_clean
from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.model.load import load_config
from retrofit.model.side_files import side_file
from retrofit.workflow.journal import is_run

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Repaired:
    """A folder whose files name what they mean for all readers. written: keys that config.json and
    tokenizer_config.json did not have, or had otherwise, by file; empty where nothing was to repair. findings: what the
    linter still says. recorded: retrofit.json holds the new digests."""

    folder: Path
    written: Mapping[str, tuple[str, ...]]
    findings: tuple[Finding, ...]
    recorded: bool


def repair(folder: Path) -> Repaired:
    """Write the names that are missing, each file whole or not at all. The same call again has nothing to do.

    retrofit.json gets the new digests where it is of this folder: every other file is as it records. Raises UserError
    for the folder of a run, an encoding that the linter refuses, and where stock transformers would load another model
    from the new files than from the old ones; the folder is as it was then.
    """
    _require_repairable(folder)
    before = load_config(folder)
    require_clean(lint_folder(folder, before), shown(folder))
    with folder_lock(folder), writing(folder), tempfile.TemporaryDirectory() as place:
        new = _new_files(folder, Path(place))
        _require_same_model(before, Path(place), folder)
        record = _own_record(folder)
        written = {name: _keys(folder, Path(place), name) for name in new}
        for name in new:
            put_file(folder / name, (Path(place) / name).read_bytes(), overwrite=True)
        if record is not None and (files := digest(folder, everything=True)) != record["files"]:
            path = write_provenance(place, {**record, "files": files})
            put_file(folder / FILE, path.read_bytes(), overwrite=True)
    return Repaired(folder, written, tuple(lint_folder(folder, load_config(folder))), record is not None)


def _require_repairable(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError("there is no such folder", where=shown(folder), fix="give the folder of a checkpoint")
    run = folder if is_run(folder) else folder.absolute().parent
    if is_run(run):
        raise UserError(
            "what a run wrote is whole, and its journal knows every file",
            where=shown(folder),
            fix=f"write it again: retrofit run {shell_word(run)} --from publish",
        )
    require_writable(folder)


def _new_files(folder: Path, place: Path) -> tuple[str, ...]:
    """Write both files into `place` as they should be; the names of those that are not so in the folder."""
    raw, settings = read_config(folder), side_file(folder, TOKENIZER)
    write_config(place, portable(raw))
    names = [CONFIG] if json.loads((place / CONFIG).read_text("utf-8")) != raw else []
    if settings:
        known = portable_tokenizer(settings)
        write_tokenizer(place, known)
        names += [TOKENIZER] if known != settings else []
    return tuple(names)


def _require_same_model(before: PretrainedConfig, place: Path, folder: Path) -> None:
    """UserError unless stock transformers loads the same configuration, under whichever names it finds it."""
    old, new = (_meaning(one) for one in (before, load_config(place)))
    if differ := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        raise UserError(
            f"with the missing names transformers would load another {', '.join(differ)}",
            where=shown(folder / CONFIG),
            fix="take config.json from the folder before it was saved again",
        )


def _meaning(config: PretrainedConfig) -> dict[str, Any]:
    """What a configuration makes of its file, without the older names themselves."""
    older = (*OLDER, "partial_rotary_factor", "_name_or_path")
    known = config.to_dict()
    rope = known.get("rope_parameters")
    length = known.get("original_max_position_embeddings")
    if isinstance(rope, dict) and length is not None:  # which stands at the top, inside, or in both places
        known["rope_parameters"] = {"original_max_position_embeddings": length, **rope}
    names = ("original_max_position_embeddings", "num_experts", "num_local_experts", *older)
    return {key: value for key, value in known.items() if key not in names}


def _own_record(folder: Path) -> dict[str, Any] | None:
    """retrofit.json, where every file but the two that are repaired is as it records."""
    if not (folder / FILE).is_file():
        return None
    record = read_provenance(folder)
    recorded, found = record.get("files") or {}, digest(folder, everything=True)
    changed = {name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name)}
    return record if recorded and changed <= {CONFIG, TOKENIZER} else None


def _keys(folder: Path, place: Path, name: str) -> tuple[str, ...]:
    """Keys whose values are new."""
    old = read_config(folder) if name == CONFIG else side_file(folder, name)
    new = json.loads((place / name).read_text("utf-8"))
    return tuple(sorted(key for key in new if old.get(key) != new[key]))
