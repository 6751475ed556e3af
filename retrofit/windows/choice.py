"""Which layers see everything: greedy, by measured losses.

A layer alone costs what its window adds to the loss of text and of answers that lie outside the window. Errors add up
on the way, so that is measured again where all other windows are in place: what a full layer's window would add, and
what a windowed layer would give back. Each round measures its variants in one pass (`ablation`); a few rounds suffice,
as most layers look back a short way only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from retrofit.windows.ablation import Variant
from retrofit.windows.outcome import Choice, Limits, Rise, Round

ROUNDS = 3
CHALLENGERS = 12
"""Windowed layers that a later round asks for what they would give back: those that cost most before."""


Measure = Callable[[Sequence[Variant]], Sequence[Rise]]
"""What the loss rises by under each variant."""


def choose(candidates: Collection[int], measure: Measure, limits: Limits, *, full: int | None = None) -> Choice:
    """Choose the layers that see everything among `candidates`; the others get windows.

    full: how many; by default all whose windows would add more than the limits.
    """
    everyone = frozenset(candidates)
    singles = [frozenset({layer}) for layer in sorted(everyone)]
    before, *alone = measure([frozenset(), *singles])
    added = {layer: rise - before for (layer,), rise in zip(singles, alone, strict=True)}
    rounds = [Round((), before, added)]
    chosen = _pick(added, limits, full)
    tried: dict[frozenset[int], Rise] = {}
    for _ in range(ROUNDS - 1):
        rounds.append(_round(everyone, chosen, {**rounds[0].added, **rounds[-1].added}, measure, limits))
        tried[chosen] = rounds[-1].rise
        following = _following(chosen, rounds[-1].added, limits, full)
        if following in tried:
            break
        chosen = following
    if chosen not in tried:
        tried[chosen] = measure([everyone - chosen])[0]
    if full is not None:
        chosen = min(tried, key=lambda layers: limits.score(tried[layers]))
    return Choice(tuple(sorted(chosen)), tried[chosen], tuple(rounds), ranking(rounds, chosen, limits))


def _round(
    everyone: frozenset[int], chosen: frozenset[int], known: Mapping[int, Rise], measure: Measure, limits: Limits
) -> Round:
    """What the windows add where all others are in place."""
    windowed = everyone - chosen
    costliest = sorted(windowed, key=lambda layer: -limits.score(known[layer]))[:CHALLENGERS]
    variants = [windowed | {layer} for layer in sorted(chosen)] + [windowed - {layer} for layer in costliest]
    rise, *others = measure([windowed, *variants])
    added = {
        layer: other - rise if layer in chosen else rise - other
        for layer, other in zip([*sorted(chosen), *costliest], others, strict=True)
    }
    return Round(tuple(sorted(windowed)), rise, added)


def _following(chosen: frozenset[int], added: Mapping[int, Rise], limits: Limits, full: int | None) -> frozenset[int]:
    """The next layers to see everything. Where nobody says how many, one at most gets its window: two of them may each
    do what the other does."""
    found = _pick(added, limits, full)
    if full is not None:
        return found
    spare = sorted(chosen - found, key=lambda layer: limits.score(added[layer]))
    return found | frozenset(spare[1:])


def _pick(added: Mapping[int, Rise], limits: Limits, full: int | None) -> frozenset[int]:
    scores = {layer: limits.score(own) for layer, own in added.items()}
    if full is None:
        return frozenset(layer for layer, score in scores.items() if score >= 1)
    return frozenset(sorted(scores, key=lambda layer: (-scores[layer], layer))[:full])


def ranking(rounds: Sequence[Round], chosen: Collection[int], limits: Limits) -> tuple[int, ...]:
    """All layers by what their windows added when that was last measured, the chosen ones first."""
    latest: dict[int, Rise] = {}
    for own in rounds:
        latest |= own.added
    return tuple(sorted(latest, key=lambda layer: (layer not in chosen, -limits.score(latest[layer]), layer)))
