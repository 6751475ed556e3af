"""What a longer context gives, from two stored passes over the same tokens: all of the context, and a short one.

ContextGain(L) is the mean of loss with the native context minus loss with context L, over the last tokens before L,
which have nearly all of that context; at the native length itself, what the second half of the native context gives.
LongPPL (Fang et al. 2025, "What is Wrong with Perplexity for Long-context Language Modeling?") is the perplexity of the
key tokens alone: those that the long context makes predictable. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrofit.evaluation.metrics.bootstrap import difference_interval, perplexity_interval
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.evaluation.scoring.windows import Tails, Windows

if TYPE_CHECKING:
    from retrofit.evaluation.scoring.losses import TokenLosses

SHORT_CONTEXT = 4096  # K of LongPPL
GAIN, SURE = 2.0, 2.0  # nats: alpha, and -beta
MOST_WEIGHT = 5.0  # gamma of LongCE
MIN_KEYS = 20  # key tokens below which an interval says nothing


@dataclass(frozen=True)
class ContextGain:
    """mean(loss with `context` tokens of context - loss with context L) in nats over the last tokens before L, each of
    which has more than `context`: the native length, and half of it where L is the native length. gain [low, high]:
    with its 95% interval.
    """

    kind: str
    length: int
    context: int
    tokens: int
    gain: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class LongPPL:
    """Perplexity of the key tokens in the first L. key_tokens: how many of `tokens`. ppl is None without any.

    low, high: the 95% interval, None under MIN_KEYS key tokens. keys_from: the model whose losses chose the key tokens.
    """

    kind: str
    length: int
    short_context: int
    tokens: int
    key_tokens: int
    ppl: float | None
    low: float | None
    high: float | None
    keys_from: str


def native_windows(native: int, lengths: Sequence[int], size: int) -> Tails:
    """Windows that give the last `size` tokens before each length beyond the native one almost the native context: at
    most a sixteenth less. With much less than that, a model that uses no more than the native would seem to gain."""
    return Tails(native, max(1, native // 16), size=size, ends=tuple(n for n in lengths if n > native))


def half_windows(native: int, size: int) -> Tails:
    """Windows that give the last `size` tokens before the native length about half of it."""
    return native_windows(native // 2, (native,), size)


def short_windows(short_context: int = SHORT_CONTEXT) -> Windows:
    """Windows that give every token beyond the first K a context of K to 1.25 K - 1 tokens, as the authors do."""
    stride = max(1, short_context // 4)
    return Windows(short_context + stride, stride)


def context_gains(
    full: TokenLosses,
    short: TokenLosses,
    native: int,
    lengths: Sequence[int],
    *,
    size: int,
    resamples: int = 2000,
    seed: int = 0,
) -> list[ContextGain]:
    """ContextGain at every length beyond `native`, by kind and for all documents.

    full: losses with all of the context. short: losses under `native_windows(native, lengths, size)`.
    """
    rows = []
    for kind in _kinds(full):
        full_kind, short_kind = (one if kind == ALL else one.of_kind(kind) for one in (full, short))
        for length in sorted(n for n in lengths if n > native):
            first = max(native, length - size)  # loss i is that of the token at position i + 1 (0-based)
            long = [array[first - 1 :] for array in full_kind.at(length)]
            cut = [array[first - 1 : length - 1] for array in short_kind.losses]
            found = difference_interval(cut, long, resamples=resamples, seed=seed)
            tokens = sum(len(array) for array in long)
            rows.append(ContextGain(kind, length, native, tokens, found.value, found.low, found.high, found.unit))
    return rows


def key_tokens(full: Sequence[np.ndarray], short: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which tokens the long context makes predictable: short - long > 2 and long < 2, both strictly. bool [T - 1]."""
    return [
        (np.asarray(b[: len(a)], np.float64) - a > GAIN) & (np.asarray(a) < SURE)
        for a, b in zip(full, short, strict=True)
    ]


def soft_weights(long: np.ndarray, short: np.ndarray) -> np.ndarray:
    """How much tokens need the long context: min(p(token | long) / p(token | short), 5), from their losses in nats.

    The soft form of `key_tokens`, by which the loss LongCE weighs tokens (the same paper, section 4).
    """
    weights: np.ndarray = np.exp(np.minimum(short - long, np.log(MOST_WEIGHT)))
    return weights


def long_ppl(
    full: TokenLosses,
    short: TokenLosses,
    lengths: Sequence[int],
    *,
    short_context: int = SHORT_CONTEXT,
    evaluator: tuple[TokenLosses, TokenLosses] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[LongPPL]:
    """LongPPL at every length beyond the short context, by kind and for all documents.

    short: losses of the same tokens under `short_windows(short_context)`. evaluator: (full, short) of the model that
    chooses the key tokens, as the paper has it; by default the model itself, whose own losses then choose them.
    """
    chooser = evaluator or (full, short)
    rows = []
    for kind in _kinds(full):
        own, *choosing = (one if kind == ALL else one.of_kind(kind) for one in (full, *chooser))
        for length in sorted(n for n in lengths if n > short_context):
            arrays = own.at(length)
            keys = key_tokens(choosing[0].at(length), [a[: length - 1] for a in choosing[1].losses])
            chosen = [a[key] for a, key in zip(arrays, keys, strict=True) if key.any()]
            count = sum(len(a) for a in chosen)
            found = perplexity_interval(chosen, resamples=resamples, seed=seed) if chosen else None
            sure = found is not None and count >= MIN_KEYS
            rows.append(
                LongPPL(
                    kind=kind,
                    length=length,
                    short_context=short_context,
                    tokens=sum(len(a) for a in arrays),
                    key_tokens=count,
                    ppl=found.value if found else None,
                    low=found.low if found and sure else None,
                    high=found.high if found and sure else None,
                    keys_from=str(chooser[0].meta.get("model", "itself")),
                )
            )
    return rows


def _kinds(losses: TokenLosses) -> tuple[str, ...]:
    return (*dict.fromkeys(losses.kinds), ALL)
