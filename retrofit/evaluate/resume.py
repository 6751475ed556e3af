"""What a stopped evaluation keeps: one array for every document that is finished. numpy only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_KEY = "key.json"


class Kept:
    """Finished arrays in a folder, good for exactly one question (`key`); another question starts anew.

    folder: None keeps nothing. A file is whole or absent, whatever is killed when.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, object]) -> None:
        self.folder = folder
        self.discarded = False
        if folder is None:
            return
        text = json.dumps(dict(key), sort_keys=True, default=str)
        stored = folder / _KEY
        if folder.exists() and not (stored.is_file() and stored.read_text(encoding="utf-8") == text):
            self.discarded = stored.is_file()
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_KEY}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(stored)

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

    def remove(self) -> None:
        """The whole result is safe elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
