"""The passes over a document that its token losses come from, and one of them made by a model that reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.sharded import ShardedReader
from retrofit.evaluation.scoring.windows import Span, Windows
from retrofit.model.frequencies import frequencies_of, varying

if TYPE_CHECKING:
    from retrofit.console import Progress


Plan = list[tuple[int, list[Span]]]
"""The passes over one document: (length its frequencies are those of, spans)."""


def plan_of(model: PreTrainedModel, document: Document, windows: Windows | None, lengths: Sequence[int]) -> Plan:
    """The passes that score a document: see `score.score`."""
    total = len(document.input_ids)
    varies = varying(model.config)
    if windows:
        return [(min(windows.length, total), list(windows.spans(total)))]
    if varies is None or not lengths:
        return [(total, [Span(0, total, 1)])]
    kind, until = varies
    inside, beyond = [n for n in lengths if n <= until], sorted(n for n in set(lengths) if n > until)
    if kind == "longrope":
        beyond = beyond[-1:]  # one set of frequencies for every length beyond
    asked = [*([max(inside)] if inside else []), *beyond]
    short = document.scored is not None  # a dialogue, whole in every longer context
    return [(length, [Span(0, min(length, total) if short else length, 1)]) for length in asked]


@dataclass(frozen=True)
class Pass:
    """One pass over document `index`, with the frequencies of `length` tokens. known: losses of the whole document,
    where those of its first span are known."""

    index: int
    document: Document
    length: int
    spans: list[Span]
    known: np.ndarray | None

    @property
    def tokens(self) -> int:
        """Those of all spans."""
        return sum(span.tokens for span in self.spans)

    @property
    def tokens_read(self) -> int:
        """Those that the model reads."""
        return sum(span.tokens for span in self.spans if not self._is_known(span))

    def _is_known(self, span: Span) -> bool:
        return self.known is not None and span.begin == 0

    @property
    def longest(self) -> int:
        """Tokens of the longest span."""
        return max(span.tokens for span in self.spans)

    def scored(self, reader: Reader | ShardedReader, progress: Progress | None) -> np.ndarray:
        """Losses float32 [stop - 1]; NaN of tokens that no span scores."""
        losses = np.full(self.spans[-1].stop - 1, np.nan, np.float32)
        ids_T = torch.from_numpy(self.document.input_ids).to(reader.model.device)
        with frequencies_of(reader.model, min(self.length, self.spans[-1].stop)):
            for span in self.spans:
                if self._is_known(span):
                    assert self.known is not None
                    losses[: span.stop - 1] = self.known[: span.stop - 1]
                    advance(progress, span.tokens, self.document)
                else:
                    found = _score_span(reader, ids_T, span, self.document, progress)
                    losses[span.first - 1 : span.stop - 1] = found
        return losses


def _score_span(
    reader: Reader | ShardedReader, ids_T: Tensor, span: Span, document: Document, progress: Progress | None
) -> np.ndarray:
    """Losses float32 [stop - first] of the tokens a span scores."""
    start = ids_T[:1] if span.start else ids_T[:0]
    read_T = torch.cat([start, ids_T[span.begin : span.stop - 1]])
    shift = span.begin - len(start) + 1  # token i of what is read predicts the document's token i + shift
    losses_T = torch.empty(span.stop - span.first, dtype=torch.float32)
    reader.rewind(0)
    done = 0
    for read, found in reader.predicted(read_T, ids_T[shift : shift + len(read_T)], span.first - shift):
        _require_finite(found, span.first + done, document, reader.model.dtype)
        losses_T[done : done + len(found)] = found
        done += len(found)
        advance(progress, read, document)
    advance(progress, span.tokens - len(read_T), document)
    return losses_T.numpy()


def advance(progress: Progress | None, tokens: int, document: Document) -> None:
    """Tell `progress` that so many tokens of a document are read."""
    if progress:
        progress.advance(tokens, document=document.name)


def _require_finite(losses: Tensor, first: int, document: Document, dtype: torch.dtype) -> None:
    """first: position of the first of these tokens in the document."""
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        position = first + int((~finite).nonzero()[0])
        raise UserError(
            f"the loss of token {position} is not a finite number (weights in {str(dtype).removeprefix('torch.')})",
            where=f"{document.name}, token {position}",
            fix="check the weights for NaN or infinity, or score in float32",
        )
