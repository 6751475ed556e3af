"""Other people's perplexities, by name, so that their tables can be reproduced: which windows, and which mean.

- `sliding`: SlidingPPL(L, S), ours: each token once, with L - S to L - 1 tokens before it, all weighing the same.
- `transformers`: the strided loop of transformers' perplexity guide, whose windows weigh their tokens less one each.
- `lm-eval`: lm-evaluation-harness's `loglikelihood_rolling`: windows with one token of context, log-likelihoods summed.
  One BOS: of a tokenizer that adds it by itself, the harness predicts a second one unless told `add_bos_token=False`.
- `yarn`: Peng et al. 2023: windows that move by 256 tokens, a BOS in each, the exponential of the mean of window means.
- `yarn-truncated`: the same cut to the first L tokens of each document, as their tables up to 128k tokens have it.
- `longlora`: Chen et al. 2023: all tokens of windows of one stream that move by 256, so most tokens count many times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.evaluation.metrics.bootstrap import perplexity_interval
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.windows import Span, Windows, rolling
from retrofit.recipe.schema import Definition

STRIDE = {"transformers": 512, "yarn": 256, "longlora": 256}


@dataclass(frozen=True)
class ProtocolResult:
    """One number as its authors define it. tokens: losses it is made of. read: tokens the passes read.

    log_likelihood and bits_per_byte are of all predicted tokens; low, high: the 95% interval. A definition that weighs
    tokens in its own way has none of them.
    """

    definition: str
    length: int
    stride: int | None
    documents: int
    tokens: int
    read: int
    ppl: float
    low: float | None = None
    high: float | None = None
    log_likelihood: float | None = None
    bits_per_byte: float | None = None


def prepared(
    definition: Definition,
    documents: Sequence[Document],
    length: int,
    *,
    bos: bool,
    prefix_id: int | None = None,
    stride: int = 256,
) -> tuple[list[Document], Windows | None]:
    """(documents to score, windows) for one context length.

    bos: the documents start with a BOS. prefix_id: what lm-eval puts in front where there is none (the EOS).
    stride: of `sliding`.

    Raises: UserError when no document is long enough.
    """
    if definition == "yarn-truncated":
        long = [document for document in documents if len(document.input_ids) >= length]
        _require(long, definition, length, documents)
        return [document.cut(length) for document in long], None
    if definition == "lm-eval":
        start = [] if bos or prefix_id is None else [prefix_id]
        return [_prefixed(document, start) for document in documents], rolling(length)
    if definition == "longlora":
        windows = _longlora(documents, length)
        _require(windows, definition, length, documents)
        return windows, None
    stride = STRIDE.get(definition, stride)
    # A window cannot move by more than itself: half of it then.
    moved = stride if stride < length else length // 2
    return list(documents), Windows(length, moved, repeat_start=definition == "yarn" and bos)


def value(definition: Definition, losses: TokenLosses, length: int, windows: Windows | None) -> ProtocolResult:
    """The number itself from the losses of what `prepared` gave."""
    passes = [
        (span, float(np.mean(array[span.first - 1 : span.stop - 1], dtype=np.float64)))
        for array in losses.losses
        for span in (windows.spans(len(array) + 1) if windows else [Span(0, len(array) + 1, 1)])
    ]
    means = np.array([mean for _, mean in passes])
    counts = np.array([span.stop - span.first for span, _ in passes])
    if definition == "transformers":  # each window weighs its labels less one; a first window has one more label
        weights = counts - np.array([span.first > 1 for span, _ in passes])
    else:
        weights = counts if definition in ("lm-eval", "sliding") else np.ones(len(passes))
    nats = float(np.sum(means * counts))
    likelihood = definition in ("lm-eval", "sliding")
    nbytes = sum(int(np.sum(array, dtype=np.int64)) for array in losses.token_bytes) if likelihood else 0
    interval = perplexity_interval(losses.losses) if likelihood else None
    return ProtocolResult(
        definition=definition,
        length=length,
        stride=windows.stride if windows else STRIDE.get(definition),
        documents=len(losses.documents),
        tokens=int(counts.sum()),
        read=sum(span.tokens for span, _ in passes),
        ppl=float(np.exp(np.sum(means * weights) / np.sum(weights))),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        log_likelihood=-nats if likelihood else None,
        bits_per_byte=nats / np.log(2) / nbytes if nbytes else None,
    )


def _longlora(documents: Sequence[Document], length: int) -> list[Document]:
    """Windows of the documents joined to one stream. Their loop leaves out its last window."""
    ids = np.concatenate([document.input_ids for document in documents])
    starts = list(range(0, len(ids) - length, STRIDE["longlora"]))[:-1]
    return [Document(f"tokens {i} to {i + length}", "stream", ids[i : i + length], 0) for i in starts]


def _prefixed(document: Document, start: list[int]) -> Document:
    if not start:
        return document
    token_bytes = (
        None if document.token_bytes is None else np.concatenate([np.zeros(1, np.int32), document.token_bytes])
    )
    ids = np.concatenate([np.array(start, np.int64), document.input_ids])
    return replace(document, input_ids=ids, token_bytes=token_bytes)


def _require(found: Sequence[Document], definition: str, length: int, documents: Sequence[Document]) -> None:
    if not found:
        longest = max((len(document.input_ids) for document in documents), default=0)
        raise UserError(
            f"`{definition}` at {length} tokens needs a longer text; the longest has {longest} tokens",
            fix="give a longer text, or a shorter length",
        )
