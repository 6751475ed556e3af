"""Bits per byte of two models with different tokenizers on the same bytes of the same texts. numpy only.

Tokens of two tokenizers do not pair, bytes do: both losses are summed between byte positions where both have a token
end, so each block holds exactly the same bytes for both models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrofit.errors import UserError
from retrofit.evaluation.metrics.bootstrap import bits_ratio_interval
from retrofit.evaluation.scoring.losses import TokenLosses

_MIN_DOCUMENTS, _MIN_BLOCKS = 5, 8
_BLOCKS = (2048, 1024, 512, 256, 128, 64, 32, 16)  # bytes


@dataclass(frozen=True)
class ComparedBits:
    """Bits per UTF-8 byte of two models on the same bytes. ratio [low, high]: b / a and its paired 95% interval."""

    kind: str
    nbytes: int
    documents: int
    tokens_a: int
    tokens_b: int
    bpb_a: float
    bpb_b: float
    ratio: float
    low: float
    high: float
    unit: str


def compare_bits(
    a: TokenLosses, b: TokenLosses, kind: str, *, where: str = "", resamples: int = 2000, seed: int = 0
) -> ComparedBits:
    """Compare the same documents of one kind. Raises UserError when their bytes are unknown or never end together."""
    pairs = [(_Bytes.of(a, i), _Bytes.of(b, i), f"{where}: {name}") for i, name in enumerate(a.documents)]
    for size in _BLOCKS:
        found = [_blocks(*pair, size) for pair in pairs]
        blocks = [block for block, _ in found]
        if sum(block.shape[1] for block in blocks) >= _MIN_BLOCKS:
            break
    tokens = np.sum([counted for _, counted in found], axis=0)
    if len(blocks) >= _MIN_DOCUMENTS:
        units, unit = np.stack([block.sum(1) for block in blocks], 1), "document"
    else:
        units, unit = np.concatenate(blocks, 1), f"block of about {size} bytes"
    nats_a, nats_b, nbytes = units
    interval = bits_ratio_interval(nats_b, nats_a, nbytes, unit, resamples=resamples, seed=seed)
    bits = np.array([nats_a.sum(), nats_b.sum()]) / np.log(2) / nbytes.sum()
    return ComparedBits(
        kind=kind,
        nbytes=int(nbytes.sum()),
        documents=len(blocks),
        tokens_a=int(tokens[0]),
        tokens_b=int(tokens[1]),
        bpb_a=float(bits[0]),
        bpb_b=float(bits[1]),
        ratio=interval.value,
        low=interval.low,
        high=interval.high,
        unit=unit,
    )


@dataclass(frozen=True)
class _Bytes:
    """ends: byte positions where tokens end, the given first token's in front; nats, tokens: summed up to there."""

    ends: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, losses: TokenLosses, index: int) -> _Bytes:
        sizes = np.asarray(losses.token_bytes[index], np.int64)
        given = losses.nbytes[index] - int(sizes.sum())  # of the first token, which nothing predicts
        ends = np.concatenate([[given], given + np.cumsum(sizes)])
        nats = np.concatenate([[0.0], np.cumsum(losses.losses[index], dtype=np.float64)])
        # Several tokens may end at one byte (pieces of one character): only the last of them ends there for good.
        last = np.append(np.diff(ends) > 0, True)
        return cls(ends[last], nats[last], np.flatnonzero(last))


def _blocks(a: _Bytes, b: _Bytes, where: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """([nats a, nats b, bytes] x blocks, tokens of each)."""
    shared, at_a, at_b = np.intersect1d(a.ends, b.ends, return_indices=True)
    if len(shared) < 2:
        raise UserError(
            "the bytes of these tokens are unknown, or the two tokenizers never end a token at the same byte",
            where=where,
            fix="score both models again with `retrofit evaluate`",
        )
    wanted = np.arange(shared[0], shared[-1], size)
    cuts = np.unique(np.append(np.searchsorted(shared, wanted), len(shared) - 1))
    rows = [np.diff(values[index][cuts]) for values, index in ((a.nats, at_a), (b.nats, at_b))]
    return np.stack([*rows, np.diff(shared[cuts]).astype(np.float64)]), np.array(
        [np.ptp(a.tokens[at_a]), np.ptp(b.tokens[at_b])]
    )
