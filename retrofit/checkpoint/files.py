"""Which files of a folder are the checkpoint: `model.safetensors`, or an index and the shards that it names.

Whatever loads, copies, compares or downloads weights takes the list from here. Stock transformers goes by the same
names, with rules of its own where a folder holds more (it applies an adapter that lies beside the model, and takes the
single file where there is an index as well). A folder that two programs would read differently is refused, and the
files are named. Copies that transformers never reads by itself are left alone: `consolidated*.safetensors`,
`original/`, variants such as `model.fp16.safetensors`, pickles, hidden files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from retrofit.errors import UserError
from retrofit.escape import shown, visible
from retrofit.files import read_json, require_regular

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\..*")
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_UNREAD = re.compile(r"consolidated.*\.safetensors|model\.[\w-]+?(-\d+-of-\d+)?\.safetensors")
# transformers reads every safetensors file of a folder that holds one of these.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SHOWN = 4  # names in a message
_NAME_BYTES = 255


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder. shards: file names, sorted. weight_map: {tensor: shard} of the index, None without."""

    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files, sorted: the index, where there is one, and the shards."""
        return tuple(sorted((*self.shards, *(() if self.weight_map is None else (INDEX,)))))


def weight_files(folder: Path) -> WeightFiles:
    """The files that are the checkpoint in `folder`; every one of them is there and can be read.

    Raises UserError, naming the files: no safetensors (pickles are never read), an adapter, a single file beside an
    index, shards that the index does not name or that are missing, an index that names something else than safetensors
    files of the folder.
    """
    present = _names(folder)
    single, index = SINGLE in present, INDEX in present
    require_no_adapter(present, shown(folder))
    if not single and not index:
        raise _no_weights(folder, present)
    weight_map = read_index(folder / INDEX) if index else None
    shards = tuple(sorted(set(weight_map.values()))) if weight_map else (SINGLE,)
    if single and shards != (SINGLE,):
        raise UserError(
            f"the folder holds {SINGLE} and {INDEX}, which names other files: some programs read the one, some the "
            "other",
            where=shown(folder),
            fix=f"keep one: move {SINGLE} out of the folder, or {INDEX} and the shards it names",
        )
    for shard in shards:
        if shard not in present:
            assert weight_map
            first = next(name for name in sorted(weight_map) if weight_map[name] == shard)
            raise UserError(
                f"the index names {shard}, and the folder does not hold it (first tensor: `{shown(first, 120)}`)",
                where=shown(folder / INDEX),
                fix=f"download {shard} into the folder",
            )
        require_regular(folder / shard, fix="download it again")
    if sharded := sorted(filter(_SHARD.fullmatch, _others(present - set(shards)))):
        reads = "; transformers would read every safetensors file" if any(map(_DISTRIBUTED.match, sharded)) else ""
        raise UserError(
            f"the folder holds shards that are not part of the model: {listed(sharded)}{reads}",
            where=shown(folder),
            fix=f"move them out of the folder; the model is {'what ' + INDEX + ' names' if index else SINGLE}",
        )
    return WeightFiles(shards, weight_map)


def others(folder: Path, files: WeightFiles) -> tuple[str, ...]:
    """Names of further safetensors files that a program could take for a part of the model, sorted."""
    return tuple(sorted(name for name in _others(_names(folder)) if name not in files.shards))


def holds_weights(folder: Path) -> bool:
    """Whether all weights are there: a folder may hold a configuration alone, or part of a download."""
    if os.path.lexists(folder / SINGLE):
        return True
    return os.path.lexists(folder / INDEX) and all(
        os.path.lexists(folder / shard) for shard in set(read_index(folder / INDEX).values())
    )


def checkpoint_files(folder: Path) -> tuple[str, ...]:
    """Names of config.json and the weights, those that are there, sorted: what a checkpoint's digest is made of."""
    weights = weight_files(folder).names if holds_weights(folder) else ()
    return tuple(sorted((*weights, *((CONFIG,) if (folder / CONFIG).is_file() else ()))))


def read_index(path: Path) -> dict[str, str]:
    """{tensor: shard} of an index file. Raises UserError for what is none, and for shards outside its folder."""
    fix = "download the file again"
    index = read_json(path, missing="the index is missing")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError("the index has no weight_map", where=shown(path), fix=fix)
    if not weight_map:
        raise UserError("the index names no tensors", where=shown(path), fix=fix)
    for name, shard in weight_map.items():
        if not _is_shard(shard):
            raise UserError(
                f"the index puts `{shown(name, 120)}` into {shown(repr(shard), 120)}, which is not a safetensors file "
                "of this folder",
                where=shown(path),
                fix="use a checkpoint in safetensors format",
            )
    if not isinstance(index.get("metadata"), dict):
        raise UserError(
            "the index has no metadata, and transformers reads none without",
            where=shown(path),
            fix='add `"metadata": {}` to it',
        )
    return weight_map


def require_no_adapter(names: Collection[str], where: str) -> None:
    """Raises UserError where a list of files holds an adapter, which changes what transformers loads."""
    adapter = sorted(filter(_ADAPTER.fullmatch, names))
    if not adapter:
        return
    if SINGLE in names or INDEX in names:
        raise UserError(
            f"an adapter lies beside the model ({listed(adapter)}): transformers applies it to the weights, other "
            "programs do not",
            where=where,
            fix="use a folder without these files if the weights have it merged, else merge it first (peft: "
            "merge_and_unload, then save_pretrained into a new folder)",
        )
    raise UserError(
        f"this is an adapter, not a model ({listed(adapter)})",
        where=where,
        fix="merge it into its base model first (peft: merge_and_unload, then save_pretrained into a new folder)",
    )


def listed(names: Iterable[str]) -> str:
    """The first names, for a message."""
    names = [shown(name) for name in names]
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"the folder cannot be read ({error.strerror})", where=shown(folder), fix="check the path, and who may read"
        ) from None


def _others(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name.endswith(SUFFIX) and name[0] != "." and not _UNREAD.fullmatch(name))


def _is_shard(name: str) -> bool:
    """A plain, visible file name: digests and uploads leave hidden files out."""
    plain = Path(name).name == name and not name.startswith(".") and visible(name) == name
    return plain and name.endswith(SUFFIX) and len(name.encode()) <= _NAME_BYTES


def _no_weights(folder: Path, present: set[str]) -> UserError:
    pickles = sorted(name for name in present if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return UserError(
            f"only safetensors are read, and the weights are pickled ({shown(pickles[0])}), which can run code when "
            "read",
            where=shown(folder / pickles[0]),
            fix="if you trust it, convert it first: AutoModelForCausalLM.from_pretrained(a).save_pretrained(b)",
        )
    found = sorted(name for name in present if SUFFIX in name)
    return UserError(
        "the folder holds no safetensors weights"
        + (f" that transformers reads, only {listed(found)}" if found else "")
        + f": no {SINGLE} and no {INDEX}",
        where=shown(folder),
        fix="give a whole checkpoint with safetensors weights, or a .gguf file",
    )
