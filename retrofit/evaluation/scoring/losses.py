"""Token losses: what one scoring pass leaves behind, as plain arrays (numpy, no torch).

l_i = -log p(token i | tokens before), natural logarithm. A document of T tokens has T - 1 losses: its first token (the
BOS, if the tokenizer has one) is given, never predicted. Perplexities, intervals and comparisons are arithmetic on
these arrays (`perplexity.py`, `bootstrap.py`).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrofit.errors import UserError

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of whole documents under one model.

    losses: per document float32 [T - 1]. token_bytes: int32 [T - 1], the bytes of the same tokens (all 0: unknown).
    nbytes: UTF-8 bytes of each document. meta: model label, dtype, kernel, chunk, windows, digest of the documents.
    by_length: only for a position encoding that changes with the length: the losses [L - 1] of a pass over the first L
    tokens, by L; `losses` are those of the longest.
    """

    documents: tuple[str, ...]
    kinds: tuple[str, ...]
    losses: tuple[np.ndarray, ...]
    nbytes: tuple[int, ...]
    token_bytes: tuple[np.ndarray, ...]
    meta: Mapping[str, object] = field(default_factory=dict)
    by_length: Mapping[int, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.documents)
        assert count == len(self.kinds) == len(self.losses) == len(self.nbytes) == len(self.token_bytes)
        assert all(a.shape == b.shape for a, b in zip(self.losses, self.token_bytes, strict=True))

    def of_kind(self, kind: str) -> TokenLosses:
        """Only the documents of one kind."""
        keep = [i for i, own in enumerate(self.kinds) if own == kind]
        return TokenLosses(
            documents=tuple(self.documents[i] for i in keep),
            kinds=tuple(self.kinds[i] for i in keep),
            losses=tuple(self.losses[i] for i in keep),
            nbytes=tuple(self.nbytes[i] for i in keep),
            token_bytes=tuple(self.token_bytes[i] for i in keep),
            meta=self.meta,
            by_length={length: tuple(arrays[i] for i in keep) for length, arrays in self.by_length.items()},
        )

    def at(self, length: int) -> tuple[np.ndarray, ...]:
        """The losses [length - 1] that one forward pass over the first `length` tokens of each document gives.

        Raises: UserError when a document is shorter, or when that length was not scored although the position encoding
        changes with it.
        """
        short = min((len(array) + 1 for array in self.losses), default=0)
        if length < 2 or short < length:
            raise UserError(
                f"perplexity at {length} tokens needs documents of at least that many; the shortest scored has {short}",
                fix="score longer documents or ask for a shorter length",
            )
        arrays = self.losses
        if self.by_length:
            arrays = self.by_length[self._pass_for(length)]
        return tuple(array[: length - 1] for array in arrays)

    def holds(self, length: int) -> bool:
        """Whether `at` has an answer."""
        long_enough = all(len(array) + 1 >= length for array in self.losses)
        return long_enough and (not self.by_length or bool(self._passes_for(length)))

    def _frequencies(self) -> Mapping[str, Any]:
        facts = self.meta.get("frequencies")
        assert isinstance(facts, Mapping)
        return facts

    def _passes_for(self, length: int) -> list[int]:
        """The stored passes whose frequencies are those of `length`."""
        facts = self._frequencies()
        until = int(facts["static_until"])
        same = [n for n in self.by_length if n >= length and (n <= until) == (length <= until)]
        if length > until and facts["rope_type"] == "dynamic":
            same = [n for n in same if n == length]
        return same

    def _pass_for(self, length: int) -> int:
        same = self._passes_for(length)
        if not same:
            rope_type = self._frequencies()["rope_type"]
            raise UserError(
                f"`{rope_type}` positions change with the length, and {length} tokens were not scored",
                fix=f"use one of {', '.join(map(str, sorted(self.by_length)))}, or evaluate with that length",
            )
        return min(same)

    def save(self, path: Path) -> None:
        """Write a compressed .npz without pickled objects; the names and `meta` are one JSON string in it."""
        header = {
            "format": _FORMAT,
            "documents": self.documents,
            "kinds": self.kinds,
            "nbytes": self.nbytes,
            "meta": dict(self.meta),
            "by_length": sorted(self.by_length),
        }
        arrays: dict[str, Any] = {f"losses_{i}": np.asarray(array, np.float32) for i, array in enumerate(self.losses)}
        arrays |= {f"token_bytes_{i}": np.asarray(array, np.int32) for i, array in enumerate(self.token_bytes)}
        for length, passes in self.by_length.items():
            arrays |= {f"losses_{i}@{length}": np.asarray(array, np.float32) for i, array in enumerate(passes)}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: Path) -> TokenLosses:
        """Read what `save` wrote.

        Raises: UserError when the file is missing, is not such a file, or has another format number.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                header = json.loads(str(stored["header"][()]))
                count = len(header["documents"])
                losses = tuple(stored[f"losses_{i}"] for i in range(count))
                token_bytes = tuple(stored[f"token_bytes_{i}"] for i in range(count))
                by_length = {
                    int(length): tuple(stored[f"losses_{i}@{length}"] for i in range(count))
                    for length in header.get("by_length", ())
                }
        except FileNotFoundError:
            raise UserError("there are no token losses here", where=str(path), fix="run `retrofit evaluate`") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                "this is not a whole file of token losses", where=str(path), fix="score the model again"
            ) from error
        if header.get("format") != _FORMAT:
            raise UserError(
                f"these token losses were written by another revision of this program, in format "
                f"{header.get('format')}; this one reads {_FORMAT}",
                where=str(path),
                fix="score the model again",
            )
        return cls(
            documents=tuple(header["documents"]),
            kinds=tuple(header["kinds"]),
            losses=losses,
            nbytes=tuple(header["nbytes"]),
            token_bytes=token_bytes,
            meta=header["meta"],
            by_length=by_length,
        )
