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

_FORMAT = 2
_BROKEN = (
    OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, EOFError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of whole documents under one model.

    losses: per document float32 [T - 1]. token_bytes: int32 [T - 1], the bytes of the same tokens (all 0: unknown).
    token_ids: int32 [T - 1], what these tokens are. nbytes: UTF-8 bytes of each document. meta: model label, its
    positions, dtype, kernel, chunk, windows, digest of the documents, and what of its kinds of text was `seen`.
    by_length: only for a position encoding that changes with the length: the losses [L - 1] of a pass over the first L
    tokens, by L; `losses` are those of the longest. scored: of dialogues bool [T - 1], the tokens that count; None for
    a text, all of whose tokens do, and () where there are texts alone. A dialogue is as long as it is, and whole in
    every longer context.
    """

    documents: tuple[str, ...]
    kinds: tuple[str, ...]
    losses: tuple[np.ndarray, ...]
    nbytes: tuple[int, ...]
    token_bytes: tuple[np.ndarray, ...]
    token_ids: tuple[np.ndarray, ...]
    meta: Mapping[str, object] = field(default_factory=dict)
    by_length: Mapping[int, tuple[np.ndarray, ...]] = field(default_factory=dict)
    scored: tuple[np.ndarray | None, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.documents)
        assert count == len(self.kinds) == len(self.losses) == len(self.nbytes)
        assert all(a.shape == b.shape for a, b in zip(self.losses, self.token_bytes, strict=True))
        assert all(a.shape == b.shape for a, b in zip(self.losses, self.token_ids, strict=True))
        assert not self.scored or len(self.scored) == count
        assert all(a.shape == b.shape for a, b in zip(self.losses, self.scored, strict=False) if b is not None)

    def of_kind(self, kind: str) -> TokenLosses:
        """Only the documents of one kind."""
        return self._only([i for i, own in enumerate(self.kinds) if own == kind])

    def prose(self) -> TokenLosses:
        """Without the dialogues."""
        return self if not self.scored else self._only([i for i, one in enumerate(self.scored) if one is None])

    def _only(self, keep: list[int]) -> TokenLosses:
        return TokenLosses(
            documents=tuple(self.documents[i] for i in keep),
            kinds=tuple(self.kinds[i] for i in keep),
            losses=tuple(self.losses[i] for i in keep),
            nbytes=tuple(self.nbytes[i] for i in keep),
            token_bytes=tuple(self.token_bytes[i] for i in keep),
            token_ids=tuple(self.token_ids[i] for i in keep),
            meta=self.meta,
            by_length={length: tuple(arrays[i] for i in keep) for length, arrays in self.by_length.items()},
            scored=tuple(self.scored[i] for i in keep) if self.scored else (),
        )

    def at(self, length: int) -> tuple[np.ndarray, ...]:
        """The losses that count of one forward pass over the first `length` tokens of each document: [length - 1] of a
        text, those of the scored tokens of a dialogue.

        Raises: UserError when a text is shorter, or when that length was not scored although the position encoding
        changes with it.
        """
        return self._counted(self.passed(length), length)

    def bytes_at(self, length: int) -> tuple[np.ndarray, ...]:
        """The bytes of the tokens that `at` has the losses of."""
        return self._counted(tuple(array[: length - 1] for array in self.token_bytes), length)

    def ids_at(self, length: int) -> tuple[np.ndarray, ...]:
        """The ids of the tokens that `at` has the losses of."""
        return self._counted(tuple(array[: length - 1] for array in self.token_ids), length)

    def _counted(self, arrays: tuple[np.ndarray, ...], length: int) -> tuple[np.ndarray, ...]:
        if not self.scored:
            return arrays
        return tuple(
            array if scored is None else array[scored[: length - 1]]
            for array, scored in zip(arrays, self.scored, strict=True)
        )

    def passed(self, length: int) -> tuple[np.ndarray, ...]:
        """The losses of all tokens of that pass, whether they count or not; raises what `at` raises."""
        prose = self._prose_lengths()
        short = min(prose, default=length if self.scored else 0)
        if length < 2 or short < length:
            raise UserError(
                f"perplexity at {length} tokens needs documents of at least that many; the shortest scored has {short}",
                fix="score longer documents or ask for a shorter length",
            )
        arrays = self.losses
        if self.by_length:
            arrays = self.by_length[self._pass_for(length)]
        return tuple(array[: length - 1] for array in arrays)

    @property
    def longest(self) -> int:
        """The longest context that `at` has losses for: of the shortest text, or without texts of the longest
        dialogue; 0 for none."""
        every = self._prose_lengths()
        return min(every) if every else max((len(array) + 1 for array in self.losses), default=0)

    @property
    def seen(self) -> dict[str, tuple[str, ...]]:
        """By kind of text, what the steps that made the model have read text of it for, as `data.seen` has it."""
        stored = self.meta.get("seen")
        if not isinstance(stored, Mapping):
            return {}
        return {str(kind): tuple(map(str, purposes)) for kind, purposes in stored.items()}

    def _prose_lengths(self) -> list[int]:
        """Tokens of each text."""
        scored = self.scored or (None,) * len(self.losses)
        return [len(array) + 1 for array, one in zip(self.losses, scored, strict=True) if one is None]

    def holds(self, length: int) -> bool:
        """Whether `at` has an answer."""
        long_enough = all(one >= length for one in self._prose_lengths())
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
            "scored": [i for i, one in enumerate(self.scored) if one is not None],
        }
        arrays: dict[str, Any] = {f"losses_{i}": np.asarray(array, np.float32) for i, array in enumerate(self.losses)}
        arrays |= {f"token_bytes_{i}": np.asarray(array, np.int32) for i, array in enumerate(self.token_bytes)}
        arrays |= {f"token_ids_{i}": np.asarray(array, np.int32) for i, array in enumerate(self.token_ids)}
        arrays |= {f"scored_{i}": one for i, one in enumerate(self.scored) if one is not None}
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
                if header.get("format") != _FORMAT:
                    raise UserError(
                        f"these token losses were written by another revision of this program, in format "
                        f"{header.get('format')}; this one reads {_FORMAT}",
                        where=str(path),
                        fix="score the model again",
                    )
                indices = range(len(header["documents"]))
                marked = set(header.get("scored", ()))
                return cls(
                    documents=tuple(header["documents"]),
                    kinds=tuple(header["kinds"]),
                    losses=tuple(stored[f"losses_{i}"] for i in indices),
                    nbytes=tuple(header["nbytes"]),
                    token_bytes=tuple(stored[f"token_bytes_{i}"] for i in indices),
                    token_ids=tuple(stored[f"token_ids_{i}"] for i in indices),
                    meta=header["meta"],
                    by_length={
                        int(length): tuple(stored[f"losses_{i}@{length}"] for i in indices)
                        for length in header.get("by_length", ())
                    },
                    scored=tuple(stored[f"scored_{i}"] if i in marked else None for i in indices) if marked else (),
                )
        except FileNotFoundError:
            raise UserError("there are no token losses here", where=str(path), fix="run `retrofit evaluate`") from None
        except _BROKEN as error:
            raise UserError(
                "this is not a whole file of token losses", where=str(path), fix="score the model again"
            ) from error
