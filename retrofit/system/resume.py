"""What unfinished work is resumed from: the key that names a piece of work, and the finished parts it keeps.

Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrofit.checkpoint.provenance import versions
from retrofit.system.world import ALONE, World

VERSION = 6
"""Of what an evaluation measures: raise it when the same model and text would give other numbers. What a stopped
evaluation kept, and the journal of a run, know evaluations by it."""
DISCARDED = "what was kept of an earlier evaluation answers another question"
_KEY = "key.json"


@dataclass(frozen=True)
class ResumeKey:
    """Everything that a piece of work depends on: its settings, what it reads, and the version of its code.

    With the same key the result is the same, so its finished parts are resumed from, and a whole one is kept.
    """

    step: str
    version: str
    settings: object
    inputs: Mapping[str, object]

    @cached_property
    def digest(self) -> str:
        """sha256 of all of it."""
        canonical = json.dumps([self.step, self.version, self.settings, dict(self.inputs)], sort_keys=True, default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()


class Kept:
    """Finished arrays and values in a folder, good for exactly one question (`key`); another question starts anew.

    folder: None keeps nothing. A file is whole or absent, whatever is killed when. Another version of this code, or of
    the packages that it computes with, asks another question.

    world: the processes that work on the question together, all of which make this object. The folder is the one that
    rank 0 names, and rank 0 alone decides what in it is good; each process keeps what it finished itself. So what is
    there can be used by any number of processes.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, object], world: World = ALONE) -> None:
        self._world = world
        self.folder = world.share(folder)
        if self.folder is None:
            self.discarded = False
            return
        # Until rank 0 has emptied it, nobody writes there.
        self.discarded = world.share(self._prepare(self.folder, key) if world.main else False)
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def _prepare(folder: Path, key: Mapping[str, object]) -> bool:
        """Make the folder one for this question; whether it held another one."""
        question = {**key, "code": VERSION, "versions": versions()}
        text = json.dumps(question, sort_keys=True, default=str)
        stored, discarded = folder / _KEY, False
        if folder.exists() and not (stored.is_file() and stored.read_text(encoding="utf-8") == text):
            discarded = stored.is_file()
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_KEY}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(stored)
        return discarded

    def arrays(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Those of these arrays that are finished, the same in every process."""
        found = ((name, self.get(name)) for name in (names if self._world.main else ()))
        return self._world.share({name: array for name, array in found if array is not None})

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these JSON values that are finished, the same in every process."""
        found = ((name, self.get_values(name)) for name in (names if self._world.main else ()))
        return self._world.share({name: values for name, values in found if values is not None})

    def get(self, name: str) -> np.ndarray | None:
        """The array of that name, if it is finished."""
        path = self.folder / f"{name}.npy" if self.folder else None
        return np.load(path, allow_pickle=False) if path and path.is_file() else None

    def put(self, name: str, array: np.ndarray) -> None:
        """Keep a finished array."""
        if self.folder is None:
            return
        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        partial.replace(self.folder / f"{name}.npy")

    def get_values(self, name: str) -> Any | None:
        """The JSON values of that name, if they are finished."""
        path = self.folder / f"{name}.json" if self.folder else None
        return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else None

    def put_values(self, name: str, values: object) -> None:
        """Keep finished JSON values; numbers come back as they were."""
        if self.folder is None:
            return
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(self.folder / f"{name}.json")
