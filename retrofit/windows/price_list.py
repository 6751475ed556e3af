"""What windows cost, before anything is written: KV bytes, and the loss of text and of answers, as arithmetic.

Measured are the state that was chosen, every state of its rounds, and what one layer more or fewer changes there. Other
full layers follow from these, layer by layer; other sizes from the energy that all windowed heads lose together,

    text(S, w) = text(S, w0) c(S, w) / c(S, w0),   c(S, w) = sum of E over the heads of the layers S,

as to first order the loss grows with the squared error that is injected. What is out of sight is so of every window
that is shorter than its distance, so the loss of answers, needles and keys does not depend on the size.

Legend: W windows, H query heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrofit.model.spec import CACHE_LENGTHS, AttentionSpec
from retrofit.windows.outcome import Choice, Rise
from retrofit.windows.sinks import fit_sinks
from retrofit.windows.store import load

SIZES = (256, 512, 1024, 2048, 4096)
SHARES = (8, 4, 2)
"""Parts of the layers that stay full, beside as many as were chosen."""


@dataclass(frozen=True)
class WindowPrice:
    """One size and the layers that see everything. size: None for the model as it is. kv_cache_bytes: of one sequence,
    by tokens. text, answers, needles, keys: what the loss rises by, in nats per token, before repair and training, the
    last two None where they were not measured. how: "original", "measured" or "predicted"."""

    size: int | None
    full_layers: tuple[int, ...]
    kv_cache_bytes: Mapping[int, int]
    text: float
    answers: float
    how: str
    needles: float | None = None
    keys: float | None = None


@dataclass(frozen=True)
class WindowList:
    """Prices, the model as it is first. choice: what was measured, with windows of `size` tokens. tokens, kinds: of the
    text that sinks were fitted on; measured_tokens: of the other. command: what writes the chosen one."""

    model: str
    target: str
    size: int
    prices: tuple[WindowPrice, ...]
    choice: Choice
    tokens: int
    kinds: tuple[str, ...]
    measured_tokens: int
    command: str
    notes: tuple[str, ...]


def sizes_within(length: int, size: int, spec: AttentionSpec) -> tuple[int, ...]:
    """Sizes that are priced from sequences of `length` tokens, `size` among them: those of which two fit, and that make
    no window longer that a layer has already."""
    longest = min((length // 2, *(layer.window for layer in spec.layers if layer.window is not None)))
    return tuple(sorted({size, *(own for own in SIZES if own <= longest)}))


def fewest_full(layers: int, full: int | None) -> int:
    """The smallest number of full layers in a list for a model of `layers` layers. full: how many are asked for, None
    where measuring says it, which may leave none."""
    return 0 if full is None else min(full, -(-layers // max(SHARES)))


def lost_energy(moments: Path, layers: Collection[int], *, sinks: bool) -> dict[int, dict[int, float]]:
    """{layer: {window: what its heads lose with the best sinks, in shares of the residual stream's energy}}."""
    found = {}
    for index in layers:
        own = load(moments, index).text
        lost_W = fit_sinks(own, sinks=sinks).lost_WH.sum(1)
        found[index] = dict(zip(own.windows, lost_W.tolist(), strict=True))
    return found


def window_prices(
    spec: AttentionSpec,
    choice: Choice,
    candidates: Sequence[int],
    always: Sequence[int],
    size: int,
    lost: Mapping[int, Mapping[int, float]],
    value_bytes: int,
) -> tuple[WindowPrice, ...]:
    """The rows of the list. candidates: layers that could be chosen. always: those that get the window in any case.
    lost: as `lost_energy` has it, of both."""
    counts = {len(choice.full), *(-(-len(spec.layers) // part) for part in SHARES)}
    everyone, sizes = set(candidates) | set(always), sorted(next(iter(lost.values())))
    rows = [WindowPrice(None, tuple(candidates), _caches(spec, value_bytes), 0.0, 0.0, "original")]
    for own in sizes:
        for count in sorted(count for count in counts if count < len(candidates)):
            full = set(choice.full) if count == len(choice.full) else set(choice.ranking[:count])
            windowed = everyone - full
            rise, measured = _rise(choice, frozenset(windowed - set(always)), frozenset(candidates))
            there = sum(lost[layer][size] for layer in windowed)
            scale = sum(lost[layer][own] for layer in windowed) / there if there > 0 else 1.0
            caches = _caches(spec.with_windows(own, windowed), value_bytes)
            how = "measured" if measured and own == size else "predicted"
            layers, text = tuple(sorted(full)), rise.far * scale
            rows.append(WindowPrice(own, layers, caches, text, rise.answers, how, rise.needles, rise.keys))
    return tuple(rows)


def _rise(choice: Choice, windowed: frozenset[int], candidates: frozenset[int]) -> tuple[Rise, bool]:
    """What the loss rises by with windows in these layers, and whether that was measured: by the last measured state of
    the same layers, else from the chosen one, a layer at a time."""
    chosen = candidates - set(choice.full)
    states = {frozenset(one.windowed): one.rise for one in choice.rounds} | {chosen: choice.rise}
    if windowed in states:
        return states[windowed], True
    added: dict[int, Rise] = {}
    for one in choice.rounds:
        added |= one.added
    found: dict[str, float] = {}
    for part in ("far", "answers", "needles", "keys"):
        if (total := getattr(choice.rise, part)) is not None:
            for layers, sign in ((windowed - chosen, 1), (chosen - windowed, -1)):
                total += sign * sum(max(0.0, getattr(added[layer], part)) for layer in layers)
            found[part] = max(0.0, total)
    return Rise(choice.rise.near, **found), False


def _caches(spec: AttentionSpec, value_bytes: int) -> dict[int, int]:
    return {tokens: spec.kv_cache_bytes(tokens, value_bytes) for tokens in CACHE_LENGTHS}
