"""What the processes of one command have to have in common, compared before the work: nodes may differ."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from retrofit.errors import UserError
from retrofit.system.world import World

_SHORT = 24
DECIDING = ("python", "attention-retrofit", "torch", "transformers", "accelerate", "peft", "safetensors")
"""Packages that a result, or what the processes say to one another, depends on."""


def require_same(world: World, seen: Mapping[str, str], *, fix: str) -> None:
    """UserError, in every process, unless all of them see the same. seen: values or digests by the item's name."""
    if world.size == 1:
        return
    everyone = world.gather((socket.gethostname(), dict(seen)))
    node, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        for item in [*first, *(item for item in other if item not in first)]:
            if first.get(item) != other.get(item):
                raise UserError(
                    f"{item} is not the same in all {world.size} processes: "
                    f"{_short(other.get(item))} for rank {rank}, {_short(first.get(item))} for rank 0",
                    where=f"rank {rank} on {host}" + (f", rank 0 on {node}" if node != host else ""),
                    fix=fix,
                )


def require_same_versions(world: World) -> None:
    """UserError unless all processes run the same versions of the packages that decide about results."""
    from retrofit.checkpoint.provenance import versions

    found = versions()
    seen = {f"the version of {name}": found[name] for name in DECIDING if name in found}
    require_same(world, seen, fix="install the same versions on every node")


def require_shared(world: World, place: Path) -> None:
    """UserError, in every process, unless all of them write to the same disk at `place`: a name alone proves nothing
    where they are on several nodes."""
    if len(set(world.gather(socket.gethostname()))) > 1:
        _require_shared(world, place)


def _require_shared(world: World, place: Path) -> None:
    folder = next(folder for folder in place.absolute().parents if folder.is_dir())
    probe = folder / world.share(f".retrofit-{secrets.token_hex(8)}")
    try:
        world.only(probe.touch)
        there = world.gather(probe.exists())
    finally:
        if world.main:
            probe.unlink(missing_ok=True)
    if not all(there):
        raise UserError(
            f"the processes do not share the folder that is written: rank {there.index(False)} sees another one",
            where=str(folder),
            fix="write to a disk that all nodes share",
        )


def digest_of(value: object) -> str:
    """A digest of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """A digest of what a checkpoint folder holds: its configuration, and the names, sizes and headers of its weights.

    Raises UserError where the folder is not there.
    """
    from retrofit.checkpoint.files import checkpoint_files

    if not folder.is_dir():
        raise UserError(
            "the folder is not there for every process",
            where=f"{folder} on {socket.gethostname()}",
            fix="use a folder that all nodes share, under the same path",
        )
    held = []
    for name in checkpoint_files(folder):
        path = folder / name
        with path.open("rb") as file:
            held.append((name, path.stat().st_size, hashlib.sha256(file.read(_HEAD)).hexdigest()))
    return digest_of(held)


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) <= _SHORT else f"{value[:12]}..."


_HEAD = 1 << 20  # bytes of each file; a header of safetensors holds names, shapes and places of its tensors
