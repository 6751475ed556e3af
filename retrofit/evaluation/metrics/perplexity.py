"""Perplexities from token losses: arithmetic on arrays, numpy only.

A context of L tokens holds L - 1 predicted tokens, so that every number at L is what a forward pass over the first L
tokens gives. `losses` is one array [T - 1] per document throughout; every document must reach L.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrofit.errors import UserError
from retrofit.evaluation.metrics.bootstrap import perplexity_interval

if TYPE_CHECKING:
    from retrofit.evaluation.scoring.losses import TokenLosses

ALL = "all"


@dataclass(frozen=True)
class Row:
    """Perplexity at one context length, over the documents of one kind or over `all`.

    tokens: predicted tokens. ppl [low, high]: PrefixPPL and its 95% interval. tail_ppl: over the last `tail` tokens.
    bpb: bits per UTF-8 byte, None when the bytes are unknown. unit: what the bootstrap resampled.
    """

    kind: str
    length: int
    tokens: int
    documents: int
    ppl: float
    low: float
    high: float
    tail: int
    tail_ppl: float
    tail_low: float
    tail_high: float
    bpb: float | None
    unit: str


def prefix(losses: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """The losses inside the first `length` tokens of every document.

    Raises: UserError when a document is shorter.
    """
    short = [len(array) + 1 for array in losses if len(array) + 1 < length]
    if short or length < 2:
        raise UserError(
            f"perplexity at {length} tokens needs documents of at least that many; the shortest scored has "
            f"{min(short, default=0)}",
            fix="score longer documents or ask for a shorter length",
        )
    return [array[: length - 1] for array in losses]


def tail(losses: Sequence[np.ndarray], length: int, size: int) -> list[np.ndarray]:
    """The losses of the last `size` tokens before `length`."""
    return last(prefix(losses, length), size)


def last(losses: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """The losses of the last `size` tokens of each document."""
    return [array[-size:] for array in losses]


def perplexity(losses: Sequence[np.ndarray]) -> float:
    """exp of the mean over all tokens of all documents."""
    return float(np.exp(sum(np.sum(a, dtype=np.float64) for a in losses) / sum(len(a) for a in losses)))


def prefix_ppl(losses: Sequence[np.ndarray], length: int) -> float:
    """PrefixPPL(L): the same documents at every L."""
    return perplexity(prefix(losses, length))


def tail_ppl(losses: Sequence[np.ndarray], length: int, size: int) -> float:
    """TailPPL(L, S): over the tokens at positions (L - S, L]."""
    return perplexity(tail(losses, length, size))


def bits_per_byte(losses: TokenLosses, length: int) -> float | None:
    """Bits of all predicted tokens in the first `length` over the UTF-8 bytes of the same tokens; None if unknown."""
    nats = sum(np.sum(a, dtype=np.float64) for a in losses.at(length))
    nbytes = sum(int(np.sum(b, dtype=np.int64)) for b in losses.bytes_at(length))
    return float(nats / np.log(2) / nbytes) if nbytes else None


def table(
    losses: TokenLosses, lengths: Sequence[int], *, tail: int = 1024, resamples: int = 2000, seed: int = 0
) -> list[Row]:
    """One row per length for each kind of text, then for all documents together (kind `all`).

    Raises: UserError when a document is shorter than the longest length.
    """
    kinds = list(dict.fromkeys(losses.kinds))
    groups = [(kind, losses.of_kind(kind)) for kind in kinds] + [(ALL, losses)]
    return [_row(kind, group, length, tail, resamples, seed) for kind, group in groups for length in sorted(lengths)]


def _row(kind: str, losses: TokenLosses, length: int, size: int, resamples: int, seed: int) -> Row:
    head = losses.at(length)
    tails = last(head, size)
    whole = perplexity_interval(head, resamples=resamples, seed=seed)
    end = perplexity_interval(tails, resamples=resamples, seed=seed)
    return Row(
        kind=kind,
        length=length,
        tokens=sum(len(a) for a in head),
        documents=len(head),
        ppl=whole.value,
        low=whole.low,
        high=whole.high,
        tail=max(len(a) for a in tails),
        tail_ppl=end.value,
        tail_low=end.low,
        tail_high=end.high,
        bpb=bits_per_byte(losses, length),
        unit=whole.unit,
    )


def loss_by_position(losses: Sequence[np.ndarray], buckets: int = 24) -> tuple[tuple[float, float], ...]:
    """(middle position, mean loss) of `buckets` equal stretches; losses is one array [T - 1] per document, cut to the
    shortest document so that every stretch is a mean over all of them."""
    shortest = min((len(array) for array in losses), default=0)
    if shortest == 0:
        return ()
    mean = np.mean([np.asarray(array[:shortest], dtype=np.float64) for array in losses], axis=0)
    edges = np.linspace(0, shortest, min(buckets, shortest) + 1).astype(int)
    return tuple(
        (float((start + stop) / 2 + 1), float(mean[start:stop].mean())) for start, stop in itertools.pairwise(edges)
    )
