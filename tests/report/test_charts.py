"""Charts hold what their tables hold, on axes that show it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from retrofit.evaluation.metrics.perplexity import loss_by_position
from retrofit.report.charts import plots
from retrofit.report.charts.drawing import STYLES, Line
from retrofit.report.charts.figures import card_picture, figures
from retrofit.report.render import html
from tests.report.made_up import run, search
from tests.report.reading import visible


def test_the_needle_map_holds_what_its_table_holds() -> None:
    (found,) = (one for one in figures(run()) if one.title == "Needle in a haystack: original")
    assert len(found.table.rows) == 15
    assert found.picture is not None
    assert found.table.rows[0] == ("2,048", "0%", "0%", "0%", "1.00", "+2.48")
    assert found.table.rows[-1] == ("16,384", "100%", "0%", "0%", "4.20", "+0.00")
    written = found.picture.themed
    # Two depths of two lengths, all past the window, and the scale of depths.
    assert written.count(">0%<") == 4 + 5 + 1
    assert ">80%<" not in written
    assert "#ffffff" in written, "text stands out from dark cells"
    assert "#010101" in written, "text stands out from light cells"


def test_the_search_is_shown_with_its_winner_and_its_reference() -> None:
    (found,) = (one for one in figures(run()) if one.section == "search")
    assert len(found.table.rows) == 4
    assert "24 encodings in 3 rounds" in found.caption
    assert found.table.rows[0][0] == f"{search().winner.label} (chosen)"
    assert any(row[0] == "yarn (reference)" for row in found.table.rows)
    assert found.picture is not None
    assert ">chosen<" in found.picture.themed
    assert ">YaRN<" in found.picture.themed
    assert found.picture.themed.count("<use ") >= 24 + 8 + 4
    assert "best of 24 position encodings measured on this model (a budget of 187,392 tokens)" in visible(html(run()))


def test_encodings_that_fail_do_not_press_the_others_together() -> None:
    got = search()
    failed = replace(got.trials[5], label="ntk theta x99", tail=7.5)
    context = replace(run().context, search=replace(got, trials=(*got.trials, failed)))  # type: ignore[type-var]
    (before,), (found,) = (
        [one for one in figures(data) if one.section == "search"] for data in (run(), run(context=context))
    )
    assert "1 of them lost more than this chart shows" in found.caption
    assert "lost more than this chart shows" not in before.caption
    assert found.picture is not None
    assert before.picture is not None
    assert found.picture.themed.count("<use ") == before.picture.themed.count("<use ")


def test_a_bound_far_above_what_was_reached_gets_a_logarithmic_axis() -> None:
    near, far = ([Line("original", [512, 2048], [y, y])] for y in (30.0, 30_000.0))
    reached = [Line("original", [512, 2048], [20.0, 18.0])]
    assert ">1,000<" not in plots.decode_by_context("a", reached, near).themed
    assert ">1,000<" in plots.decode_by_context("a", reached, far).themed


def test_wide_values_get_a_logarithmic_axis() -> None:
    lengths = [1024, 2048]
    narrow = plots.perplexity_by_length("a", [Line("original", lengths, [10, 40])], native=1024)
    wide = plots.perplexity_by_length("a", [Line("original", lengths, [10, 900_000])], native=1024)
    assert ">20<" in narrow.themed
    assert ">100,000<" not in narrow.themed
    assert ">100,000<" in wide.themed
    assert ">1,000<" in wide.themed


def test_native_window_is_marked_only_inside_the_axis() -> None:
    lines = [Line("original", [1024, 2048], [10, 40])]
    assert ">native<" in plots.perplexity_by_length("a", lines, native=2048).themed
    assert ">native<" not in plots.perplexity_by_length("a", lines, native=65536).themed


def test_models_are_told_apart_without_colour() -> None:
    styles = list(STYLES.values())
    assert len({style.marker for style in styles}) == len({str(style.dash) for style in styles}) == len(styles)
    picture = card_picture(run())
    assert picture is not None
    assert all(f">{label}<" in picture.themed for label in ("original", "converted", "recovered"))


def test_loss_by_position_is_the_mean_over_documents() -> None:
    losses = [np.arange(8, dtype=np.float32), np.arange(12, dtype=np.float32) + 2]
    assert loss_by_position(losses, buckets=4) == ((2.0, 1.5), (4.0, 3.5), (6.0, 5.5), (8.0, 7.5))
    assert loss_by_position([], buckets=4) == ()
    assert len(loss_by_position([np.zeros(3)], buckets=24)) == 3
