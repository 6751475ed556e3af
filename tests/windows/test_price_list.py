"""The list of windows is arithmetic on what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retrofit.model.families import describe
from retrofit.windows.outcome import Choice, Rise, Round
from retrofit.windows.price_list import sizes_within, window_prices
from tests.tiny import tiny_config

LAYERS = 8
SPEC = describe(tiny_config("llama", num_hidden_layers=LAYERS))
ALL = tuple(range(LAYERS))
ADDED = {i: Rise(0.0, 0.001 * i, 0.0) for i in ALL} | {7: Rise(0.0, 0.01, 2.0), 3: Rise(0.0, 0.02, 0.5)}
CHOSEN = Rise(0.01, 0.1, 0.25)
CHOICE = Choice(
    full=(3, 7),
    rise=CHOSEN,
    rounds=(Round((), Rise(0.0, 0.0, 0.0), ADDED), Round((0, 1, 2, 4, 5, 6), CHOSEN, {6: Rise(0.0, 0.03, 0.1)})),
    ranking=(7, 3, 6, 5, 4, 2, 1, 0),
)
LOST = {layer: {256: 4.0, 512: 1.0 + layer, 1024: 0.5} for layer in ALL}


def test_every_row_is_the_measured_state_or_follows_from_it() -> None:
    rows = window_prices(SPEC, CHOICE, ALL, (), 512, LOST, 2)
    found = {(row.size, len(row.full_layers)): row for row in rows}
    assert rows[0].how == "original"
    assert (rows[0].text, rows[0].answers) == (0.0, 0.0)
    assert set(found) == {(None, 8), *((size, count) for size in (256, 512, 1024) for count in (1, 2, 4))}
    measured = found[512, 2]
    assert measured.how == "measured"
    assert measured.full_layers == (3, 7)
    assert (measured.text, measured.answers) == (0.1, 0.25)
    one, four = found[512, 1], found[512, 4]
    assert one.full_layers == (7,)
    assert one.text == pytest.approx(0.1 + ADDED[3].far)
    assert one.answers == pytest.approx(0.25 + ADDED[3].answers)
    assert four.full_layers == (3, 5, 6, 7)
    assert four.text == pytest.approx(0.1 - 0.03 - ADDED[5].far), "what was measured last counts"
    assert four.answers == pytest.approx(0.25 - 0.1)
    windowed = (0, 1, 2, 4, 5, 6)
    lost = sum(LOST[layer][512] for layer in windowed)
    assert found[256, 2].text == pytest.approx(0.1 * 4 * 6 / lost)
    assert found[1024, 2].text == pytest.approx(0.1 * 0.5 * 6 / lost)
    assert found[1024, 2].answers == 0.25, "out of sight is out of sight"
    assert {row.how for row in rows if row.size not in (None, 512)} == {"predicted"}


def test_needles_and_keys_follow_as_answers_do() -> None:
    def also(rise: Rise, needles: float, keys: float) -> Rise:
        return replace(rise, needles=needles, keys=keys)

    first, second = CHOICE.rounds
    added = {layer: also(rise, 0.1 * layer, 0.2 * layer) for layer, rise in first.added.items()}
    rise = also(CHOICE.rise, 1.0, 2.0)
    rounds = replace(first, added=added), replace(second, rise=rise, added={6: also(second.added[6], 0.6, 1.2)})
    rows = window_prices(SPEC, replace(CHOICE, rise=rise, rounds=rounds), ALL, (), 512, LOST, 2)
    found = {(row.size, len(row.full_layers)): row for row in rows}
    assert (found[512, 2].needles, found[512, 2].keys) == (1.0, 2.0)
    assert found[256, 1].needles == pytest.approx(1.0 + 0.3)
    assert found[512, 4].keys == pytest.approx(max(0.0, 2.0 - 1.2 - 1.0))
    assert window_prices(SPEC, CHOICE, ALL, (), 512, LOST, 2)[1].keys is None


def test_caches_grow_in_full_layers_alone() -> None:
    rows = window_prices(SPEC, CHOICE, ALL, (), 512, LOST, 2)
    token = 2 * 4 * 16 * 2  # keys and values of a layer
    for row in rows:
        windowed = 0 if row.size is None else LAYERS - len(row.full_layers)
        for tokens, nbytes in row.kv_cache_bytes.items():
            assert nbytes == token * ((LAYERS - windowed) * tokens + windowed * (row.size or 0))


def test_layers_that_have_windows_in_any_case_are_part_of_what_is_lost() -> None:
    candidates = tuple(range(1, LAYERS))
    rows = window_prices(SPEC, CHOICE, candidates, (0,), 512, LOST, 2)
    found = {(row.size, len(row.full_layers)): row for row in rows}
    assert found[512, 2].how == "predicted" or found[512, 2].text == 0.1
    lost = {size: sum(LOST[layer][size] for layer in (0, 1, 2, 4, 5, 6)) for size in (256, 512)}
    assert found[256, 2].text / found[512, 2].text == pytest.approx(lost[256] / lost[512])


def test_sizes_are_those_that_the_sequences_show() -> None:
    assert sizes_within(2048, 512, SPEC) == (256, 512, 1024)
    assert sizes_within(400, 100, SPEC) == (100,)
    assert sizes_within(16_384, 768, SPEC) == (256, 512, 768, 1024, 2048, 4096)
    assert sizes_within(16_384, 256, SPEC.with_windows(600, {1})) == (256, 512), "no window becomes longer"
