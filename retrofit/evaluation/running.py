"""What running a model costs, as it was measured: one record for each length. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COST_ROUNDS = 4  # turns of the first and the last model when what they cost to run is measured
GPU_BATCHES = (1, 8, 32)  # sequences decoded together where a recipe names none
LOOP_STEPS = 4  # launched from Python where the same step is then replayed: each takes as long as the one before
FEWEST_ROUNDS = 3  # of each model: two of one are faster than two of the other by chance once in three times


@dataclass(frozen=True)
class BatchCost:
    """`batch` equal sequences decoded together after a prefill, over a cache of fixed size.

    kv_bytes: of that cache, decoded tokens included. decode_bound: the most that this machine could do. loop_rounds:
    each step launched anew from Python; graph_rounds: the step captured once as a CUDA graph, as serving engines do.
    Speeds are tokens per second of all sequences together. note: why one of them, or both, were not measured.
    """

    batch: int
    kv_bytes: int
    decode_bound: float
    loop_rounds: tuple[float, ...]
    graph_rounds: tuple[float, ...]
    note: str = ""

    @property
    def loop_per_s(self) -> float | None:
        """Median over the rounds."""
        return statistics.median(self.loop_rounds) if self.loop_rounds else None

    @property
    def graph_per_s(self) -> float | None:
        """Median over the rounds."""
        return statistics.median(self.graph_rounds) if self.graph_rounds else None


@dataclass(frozen=True)
class LengthCost:
    """One sequence of `length` tokens, read in one pass, then `decode_tokens` greedy tokens after it, in each round.

    prefill_seconds: until the first token is known. prefill_bytes: memory beyond the weights at the pass's peak, KV
    cache included. kv_bytes: what the cache held after the prefill; kv_bytes_expected: from the spec. decode_per_s is
    None when nothing was decoded. Seconds and speeds are medians over the rounds, which prefill_rounds (seconds) and
    decode_rounds (tokens per second) hold. The bounds are the most this machine could do, in tokens per second.
    batches: the same with a cache of fixed size, one sequence or several at once.
    """

    length: int
    prefill_seconds: float
    prefill_per_s: float
    prefill_bound: float
    prefill_bytes: int
    kv_bytes: int
    kv_bytes_expected: int
    decode_tokens: int
    decode_per_s: float | None
    decode_bound: float
    prefill_rounds: tuple[float, ...]
    decode_rounds: tuple[float, ...]
    batches: tuple[BatchCost, ...] = ()


@dataclass(frozen=True)
class Change:
    """A ratio of two speeds, and the least and the most that the rounds allow it to be."""

    ratio: float
    low: float
    high: float


def decoding_change(before: LengthCost, after: LengthCost) -> Change | None:
    """Return how much faster `after` decodes than `before`; None where the rounds do not tell the two apart.

    They do when every round of one is faster than every round of the other, and when the rounds of neither differ from
    each other by more than the two models do. That takes several rounds of each.
    """
    if before.length != after.length:
        return None
    return speed_change(before.decode_rounds, after.decode_rounds)


def speed_change(old: Sequence[float], new: Sequence[float]) -> Change | None:
    """How much faster the rounds `new` are than `old`; None as in `decoding_change`."""
    if min(len(old), len(new)) < FEWEST_ROUNDS:
        return None
    ratio = statistics.median(new) / statistics.median(old)
    disagreement = max(max(rounds) / min(rounds) for rounds in (old, new))
    apart = max(old) < min(new) or max(new) < min(old)
    if not apart or disagreement >= max(ratio, 1 / ratio):
        return None
    return Change(ratio, min(new) / max(old), max(new) / min(old))


@dataclass(frozen=True)
class RunCost:
    """By length, and what was measured: kernel, dtype, and the machine's bytes and operations per second.

    weight_bytes: what one decoded token reads; an input table that is not the output's is not counted. Of a mixture of
    experts all experts are, so that its bound can be exceeded.
    """

    lengths: tuple[LengthCost, ...]
    weight_bytes: int
    kernel: str
    dtype: str
    device: str
    bytes_per_second: float
    flops_per_second: float
