"""Losses by token frequency against a loop over tokens, and the identity: a model against itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from retrofit.evaluation.metrics.frequency import BANDS, by_frequency, ranks, shared_length
from retrofit.evaluation.scoring.losses import TokenLosses

LENGTH = 1400


def made_up(seed: int, *, dialogue: bool = False) -> TokenLosses:
    """Six documents of two kinds, tokens drawn by Zipf's law: some ranks lie above 1,000."""
    rng = np.random.default_rng(seed)
    ids = np.random.default_rng(7)
    tokens = [1600, 1450, 1500, 1700, 1420, 3000]
    return TokenLosses(
        documents=tuple(f"d{i}" for i in range(6)),
        kinds=("a", "b", "a", "b", "a", "b"),
        losses=tuple(rng.gamma(2, 1, n - 1).astype(np.float32) for n in tokens),
        nbytes=tuple(tokens),
        token_bytes=tuple(np.ones(n - 1, np.int32) for n in tokens),
        token_ids=tuple(np.minimum(ids.zipf(1.05, n - 1), 40_000).astype(np.int32) for n in tokens),
        scored=(None, None, None, None, None, np.arange(2999) % 3 == 0) if dialogue else (),
    )


def brute_force(before: TokenLosses, after: TokenLosses, kind: str) -> dict[tuple[int, int | None], tuple[float, ...]]:
    """{band: (tokens, perplexity before, after)}, one token at a time."""
    seen = []
    for i in range(6):
        if kind not in ("all", before.kinds[i]):
            continue
        for t in range(LENGTH - 1):
            if not before.scored or before.scored[i] is None or before.scored[i][t]:
                seen.append((int(before.token_ids[i][t]), float(before.losses[i][t]), float(after.losses[i][t])))
    counts = Counter(token for token, _, _ in seen)
    order = sorted(counts, key=lambda token: (-counts[token], token))
    rank = {token: place for place, token in enumerate(order, 1)}
    found = {}
    for first, last in BANDS:
        inside = [(x, y) for token, x, y in seen if first <= rank[token] and (last is None or rank[token] <= last)]
        if inside:
            means = [math.fsum(pair[i] for pair in inside) / len(inside) for i in (0, 1)]
            found[first, last] = (len(inside), *map(math.exp, means))
    return found


@pytest.mark.parametrize("dialogue", [False, True])
def test_bands_are_those_of_a_loop_over_tokens(dialogue: bool) -> None:
    before, after = made_up(0, dialogue=dialogue), made_up(1, dialogue=dialogue)
    found = by_frequency(before, after, LENGTH, resamples=200)
    assert list(dict.fromkeys(row.kind for row in found)) == ["a", "b", "all"]
    for kind in ("a", "b", "all"):
        rows = {(row.first, row.last): row for row in found if row.kind == kind}
        expected = brute_force(before, after, kind)
        assert rows.keys() == expected.keys()
        for band, (tokens, old, new) in expected.items():
            row = rows[band]
            assert (row.tokens, row.length) == (tokens, LENGTH)
            assert (row.before, row.after) == pytest.approx((old, new), rel=1e-6)
            assert row.ratio == pytest.approx(new / old, rel=1e-6)
            assert row.low <= row.ratio <= row.high
    every, *bands = [row for row in found if row.kind == "all"]
    assert every.tokens == sum(row.tokens for row in bands)
    assert every.unit == "document"


def test_a_model_against_itself_is_as_good_in_every_band() -> None:
    losses = made_up(0)
    for row in by_frequency(losses, losses, LENGTH, resamples=100):
        assert (row.ratio, row.low, row.high) == (1.0, 1.0, 1.0)


def test_what_only_rare_tokens_lose_shows_in_their_band() -> None:
    before = made_up(0)
    ranked = ranks(before.ids_at(before.longest))
    arrays = [x[: len(r)] + np.float32(0.5) * (r > 100) for x, r in zip(before.losses, ranked, strict=True)]
    after = replace(before, losses=tuple(np.resize(x, len(y)) for x, y in zip(arrays, before.losses, strict=True)))
    found = by_frequency(before, after, before.longest, resamples=100)
    ratios = {(row.first, row.last): row.ratio for row in found if row.kind == "all"}
    assert ratios[1, 10] == ratios[11, 100] == 1.0
    assert ratios[101, 1000] == pytest.approx(math.exp(0.5), rel=1e-6)
    assert ratios[1001, None] == pytest.approx(math.exp(0.5), rel=1e-6)


def test_equally_frequent_tokens_are_ranked_by_their_ids() -> None:
    found = ranks([np.array([9, 4, 4, 7]), np.array([7, 2])])
    assert [array.tolist() for array in found] == [[4, 1, 1, 2], [2, 3]]


def test_the_length_is_the_longest_that_both_windows_hold() -> None:
    assert shared_length([512, 2048, 4096], [2048, 16384]) == 2048
    assert shared_length([512, 2048], [None, 16384]) == 2048
    assert shared_length([4096], [2048, 16384]) is None
