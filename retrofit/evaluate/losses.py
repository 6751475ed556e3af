"""Token losses: what one scoring pass leaves behind, as plain arrays (numpy, no torch).

l_i = -log p(token i | tokens before), natural logarithm. A document of T tokens has T - 1 losses: its first token (the
BOS, if the tokenizer has one) is given, never predicted. Perplexities, intervals and comparisons are arithmetic on
these arrays (`perplexity.py`, `bootstrap.py`).
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrofit.errors import UserError

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Document:
    """One text as tokens.

    name: what it is called in messages and results. kind: the text source it came from.
    input_ids: int64 [T], one BOS in front if the tokenizer has one. nbytes: UTF-8 bytes these tokens cover.
    token_bytes: int32 [T], the bytes of each token (0 for the BOS), sum nbytes; without it bits per byte is unknown.
    """

    name: str
    kind: str
    input_ids: np.ndarray
    nbytes: int
    token_bytes: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.input_ids.ndim == 1, f"input_ids must be [T], got {self.input_ids.shape}"
        assert self.token_bytes is None or self.token_bytes.shape == self.input_ids.shape


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of whole documents under one model.

    losses: per document float32 [T - 1]. token_bytes: int32 [T - 1], the bytes of the same tokens (all 0: unknown).
    nbytes: UTF-8 bytes of each document. meta: model label, dtype, kernel, chunk, digest of the documents.
    """

    documents: tuple[str, ...]
    kinds: tuple[str, ...]
    losses: tuple[np.ndarray, ...]
    nbytes: tuple[int, ...]
    token_bytes: tuple[np.ndarray, ...]
    meta: Mapping[str, object] = field(default_factory=dict)

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
        )

    def save(self, path: Path) -> None:
        """Write a compressed .npz without pickled objects; the names and `meta` are one JSON string in it."""
        header = {
            "format": _FORMAT,
            "documents": self.documents,
            "kinds": self.kinds,
            "nbytes": self.nbytes,
            "meta": dict(self.meta),
        }
        arrays: dict[str, Any] = {f"losses_{i}": np.asarray(array, np.float32) for i, array in enumerate(self.losses)}
        arrays |= {f"token_bytes_{i}": np.asarray(array, np.int32) for i, array in enumerate(self.token_bytes)}
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
        except FileNotFoundError:
            raise UserError("there are no token losses here", where=str(path), fix="run `retrofit evaluate`") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                "this is not a whole file of token losses", where=str(path), fix="score the model again"
            ) from error
        if header.get("format") != _FORMAT:
            raise UserError(
                f"these token losses have format {header.get('format')}; this version reads {_FORMAT}",
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
        )


def documents_digest(documents: Sequence[Document]) -> str:
    """sha256 over names and tokens: two `TokenLosses` may be compared when theirs agree."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0")
        digest.update(np.ascontiguousarray(document.input_ids, dtype="<i8").tobytes())
    return digest.hexdigest()
