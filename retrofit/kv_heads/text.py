"""The text of a calibration: token ids by kind, in batches and folds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_PER_BATCH = 8192
AVERAGED_TOKENS = 8192  # tokens whose attention patterns average the values, by default


@dataclass(frozen=True)
class CalibrationText:
    """Token ids [N, T] and the kind of text of each of the N sequences. notes: what was not done as asked, and why.
    content: digest of the sources that it was taken from."""

    input_ids_NT: Tensor
    kinds: tuple[str, ...]
    notes: tuple[str, ...] = ()
    content: str | None = None

    def __post_init__(self) -> None:
        assert len(self.kinds) == self.input_ids_NT.shape[0]

    @property
    def tokens_by_kind(self) -> dict[str, int]:
        """Tokens of each kind of text."""
        length = self.input_ids_NT.shape[1]
        return {kind: self.kinds.count(kind) * length for kind in dict.fromkeys(self.kinds)}

    def batches(self) -> list[tuple[str, Tensor]]:
        """(kind, ids [B, T]) of one kind each, at most TOKENS_PER_BATCH tokens and half of the kind's sequences."""
        out = []
        for kind in dict.fromkeys(self.kinds):
            rows = [i for i, k in enumerate(self.kinds) if k == kind]
            size = max(1, min(TOKENS_PER_BATCH // self.input_ids_NT.shape[1], len(rows) // 2))
            out += [(kind, self.input_ids_NT[rows[i : i + size]]) for i in range(0, len(rows), size)]
        return out

    def folds(self) -> tuple[tuple[str, int], ...]:
        """(kind, part) of each batch. Repairs are checked on parts of each kind, and on kinds, that a trial fit does
        not see."""
        seen: dict[str, int] = {}
        found = []
        for kind, _ in self.batches():
            found.append((kind, seen.get(kind, 0) % 2))
            seen[kind] = seen.get(kind, 0) + 1
        return tuple(found)

    def digest(self) -> str:
        """sha256 of ids and kinds."""
        ids = self.input_ids_NT.to(torch.int64).contiguous()
        found = hashlib.sha256(json.dumps([list(ids.shape), self.kinds]).encode())
        found.update(ids.numpy().data)
        return found.hexdigest()
