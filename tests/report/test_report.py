"""A report says what the data says, with or without any part of a run, and nothing in it can break the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from retrofit.console import jsonable
from retrofit.evaluation.metrics.context_use import LongContext, restored
from retrofit.evaluation.result import ModelEvaluation
from retrofit.kv_heads.repair.outcome import LayerReport
from retrofit.publishing.gate import GateResult
from retrofit.report.charts.figures import card_picture, figures
from retrofit.report.data import RunData, StepRecord
from retrofit.report.render import html, markdown, render
from retrofit.report.sections import costs, summary
from tests.report.made_up import conversion, effective, long_context, model, run
from tests.report.reading import visible


@pytest.fixture(scope="module")
def page() -> str:
    return html(run())


def test_verdict_and_key_numbers() -> None:
    data = run()
    assert summary.verdict(data) == (
        "SmolLM2-135M-Instruct now has a 3× smaller KV cache and reads 16,384 tokens instead of 8,192; its perplexity "
        "at 8,192 tokens is 1.5× the original's on python-docs and 1.71× on python-stdlib."
    )
    shown = {number.label: (number.value, number.detail) for number in summary.key_numbers(data)}
    assert shown["KV cache"] == ("÷ 3", "3 → 1 KV heads, 360 MiB → 120 MiB at 16,384 tokens")
    assert shown["Context length"] == ("16,384", "tokens, was 8,192")
    assert shown["Perplexity against the original, python-docs"] == ("1.5×", "10.4 → 15.6 at 8,192 tokens")
    assert shown["Decoding speed"] == (
        "1.18× to 1.23×", "tokens/s 20.1 → 23.8 after 512; 16.3 → 20.0 after 2,048 tokens",
    )  # fmt: skip
    assert "76.5" in shown["Perplexity at 16,384 tokens"][1]


def test_the_verdict_says_how_much_of_the_window_is_used() -> None:
    recovered = run().models[2]
    short = LongContext(8192, effective=replace(effective("recovered"), length=8192))
    data = run(models=(*run().models[:2], replace(recovered, long_context=short)))
    said = "reads 16,384 tokens instead of 8,192; of its context of 16,384 tokens, 8,192 are shown to be used; its "
    assert said in summary.verdict(data)


def test_the_cache_is_computed_up_to_the_window() -> None:
    shown = dict(row[:2] for row in costs.memory(run()).rows)
    assert "16,384 (the context length)" in shown
    assert "8,192" in shown
    (cache,) = (one for one in costs.figures(run()) if one.title == "Memory of the KV cache")
    assert "Computed from the configuration" in cache.caption


def test_comparison_table_holds_the_rows() -> None:
    table = summary.comparison(run(), "python-docs")
    assert table.headers == ("context length", "original", "converted", "recovered", "ratio")
    assert table.rows[0] == ("1,024", "14.2 [13.2, 15.3]", "61.0 [56.7, 65.9]", "20.3 [18.9, 21.9]", "1.43×")
    assert table.rows[-1][0] == "16,384 (past native)"


def test_page_has_every_part(page: str) -> None:
    text = visible(page)
    for part in (
        "What was done",
        "Before and after",
        "What to watch out for",
        "Loss by position",
        "Loss during training",
        "Memory of the KV cache",
        "Decoding speed",
        "Speed and memory by context length",
        "What the conversion cost in each layer",
        "How it answers questions",
        "Whether the long context is used",
        "How the position encoding was chosen",
        "What it lost within the original",
        "ppl_ratio@8192",
        "fresh process with stock transformers",
        "Time and memory",
        "3 min 21 s",
        "retrofit run quickstart",
        "percentile bootstrap",
        "blocks of 512 tokens",
    ):
        assert part in text, part
    assert page.count("<svg") == 11  # 3 kinds, positions, 2 needles, search, 4 others
    assert page.count("The data of this chart") == 8, "the tables of the 3 kinds stand in the page already"
    assert page.count('<figure class="wide') == 7  # short context, tasks, certificate, gain, RULER, LongPPL, others'


def test_page_is_self_contained_and_well_formed(page: str) -> None:
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "@import" not in page
    assert "url(http" not in page
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert root[0].tag == "title"
        assert root[0].text
    assert "#101112" not in page


def test_same_data_same_bytes(page: str) -> None:
    assert html(run()) == page
    first, second = card_picture(run()), card_picture(run())
    assert first == second
    assert first is not None
    assert first.png.startswith(b"\x89PNG")
    assert "dc:date" not in first.svg


def untested() -> LongContext:
    """A certificate that rests on the tail alone."""
    tests = tuple(
        replace(one, gain=None, gain_low=None, gain_high=None, gain_passed=None, needle=None, needle_bound=None,
                needle_passed=None, margins={"tail": 0.01})
        for one in effective("recovered").tests
    )  # fmt: skip
    return LongContext(8192, effective=replace(effective("recovered"), tests=tests, not_tested=("needle at 16384",)))


EMPTY = RunData(name="empty")
CASES = {
    "empty": EMPTY,
    "without convert": run(conversion=None, models=(model("original", 3), replace(model("recovered", 3)))),
    "without recover": run(training=(), models=(model("original", 3), model("converted", 1))),
    "without evaluate": run(
        models=tuple(
            replace(one, rows=(), position_losses=(), cost=None)
            for one in (model("original", 3), model("converted", 1))
        )
    ),
    "nothing asked about context": run(
        models=tuple(replace(one, long_context=None, short_context=()) for one in run().models), context=None
    ),
    "perplexities of others only": run(
        models=tuple(
            replace(one, long_context=LongContext(8192, defined=long_context(one.label).defined))
            for one in run().models
        )
    ),
    "certified without gain and needle": run(models=(replace(run().models[2], long_context=untested()),)),
    "original only": run(
        models=(model("original", 3),), conversion=None, context=None, training=(), claimed_length=8192
    ),
    "no native length": run(native_length=None, claimed_length=None),
    "unmeasured memory": run(steps=(StepRecord("convert"),), gate=(), reload=None, kernel_proof=None, kernel=None),
    "conversion without costs": run(conversion=replace(conversion(), layers=(LayerReport(0, ()),))),
    "one kind": run(models=tuple(replace(one, rows=one.rows[:5]) for one in run().models)),
    "unknown labels": run(models=(model("original", 3), replace(model("recovered", 1), label="searched"))),
    "no held-out loss": run(training=((1, 2.0, None), (2, 1.0, None))),
    "nothing written": run(models=tuple(replace(one, continuations=()) for one in run().models)),
    "held-out loss only": run(training=((1, None, 2.0), (2, None, 2.5))),
}


@pytest.mark.parametrize("name", CASES)
def test_any_part_may_be_missing(name: str) -> None:
    data = CASES[name]
    shown = figures(data)
    page, plain = html(data, shown), markdown(data, shown)
    for text in (visible(page), plain):
        assert "None" not in text
        assert "nan" not in text.split()
        assert summary.verdict(data).split(";")[0][:40] in text
    assert "What the measures mean" in page


def test_verdicts_without_parts() -> None:
    assert summary.verdict(EMPTY) == (
        "the model keeps its KV cache and its context length; how well it predicts text was not compared."
    )
    assert "was measured as it is" in summary.verdict(CASES["original only"])
    assert "not compared" in summary.verdict(CASES["without evaluate"])
    assert "smaller KV cache" not in summary.verdict(CASES["without convert"])


def test_cautions_follow_the_data() -> None:
    assert not any("one kind" in text for text in summary.cautions(run()))
    assert any("one kind of text only (python-docs)" in text for text in summary.cautions(CASES["one kind"]))
    assert any("2 documents" in text for text in summary.cautions(run()))
    assert any("rose again" in text for text in summary.cautions(CASES["held-out loss only"]))
    assert not any("rose again" in text for text in summary.cautions(run()))
    unchanged = run(training=((0, None, 2.0), (1, None, 2.5)), recovery=replace(run().recovery, best_step=0))  # type: ignore[type-var]
    assert not any("rose again" in text for text in summary.cautions(unchanged))
    failed = run(gate=(GateResult("kv_ratio", ">= 4", 3.0, False, "x"),))
    assert "Requirement not met: kv_ratio >= 4." in summary.cautions(failed)
    assert ("0 of 1 requirements met", False) in summary.checks(failed)
    assert any("not measured to its end" in text for text in summary.cautions(run(claimed_length=65536)))
    unproven = run(kernel_proof=replace(run().kernel_proof, passed=False))  # type: ignore[type-var]
    assert any("kernel differs by 3.10e-05" in text for text in summary.cautions(unproven))
    assert "MORE THAN the tolerance" in html(unproven, ())


def test_text_cannot_break_the_page_or_the_table() -> None:
    bad = "<script>alert(1)</script>|`x`$y_1^2$ {{ 7*7 }} \\"
    rows = tuple(replace(row, kind=bad) for row in run().models[0].rows[:5])
    data = run(
        name=bad, model=bad, notes=(bad,), commands=(bad,), recipe_yaml=bad, description=bad,
        models=(ModelEvaluation("original", rows), ModelEvaluation(bad, rows)),
    )  # fmt: skip
    page, plain = html(data), markdown(data)
    assert "<script>" not in page
    assert "{{ 7*7 }}" in visible(page)
    assert "&lt;script&gt;" in page
    table = next(line for line in plain.splitlines() if line.startswith("| 1,024"))
    header = next(line for line in plain.splitlines() if line.startswith("| context length"))
    assert len(re.findall(r"(?<!\\)\|", table)) == len(re.findall(r"(?<!\\)\|", header))


def test_the_effective_length_stands_at_the_top_with_its_certificate_below(page: str) -> None:
    shown = {number.label: (number.value, number.detail) for number in summary.key_numbers(run())}
    assert shown["Effective length"] == ("16,384", "tokens, the original's 8,192")
    (table,) = (one.table for one in figures(run()) if one.title == "Effective length")
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert len(rows) == 10
    assert rows["16,384", "original"] == (
        "NOT PASSED", "9.20 [8.92, 9.48]", "-2.10 [-2.11, -2.09]", "0.05 (needs 0.77)",
        "tail -2.200 nats, needle -0.715, gain -2.110 nats",
    )  # fmt: skip
    assert rows["16,384", "recovered"][0] == "passed"
    assert "tail +0.038 nats" in rows["16,384", "recovered"][-1]
    assert "tail" not in rows["4,096", "recovered"][-1], "below the native length the tail proves nothing"
    text = visible(page)
    assert "Not beyond, at 16384 tokens: the tail is not shown to be predicted as well" in text
    assert "saves 0.0410 nats a token on the same tokens (0.0310 to 0.0510)" in text
    assert not any("effective length" in one.lower() for one in summary.cautions(run()))
    less = run(models=(model("original", 3), replace(model("recovered", 1), long_context=long_context("original"))))
    assert any("8,192 tokens, less than the context of 16,384. Stopped by" in one for one in summary.cautions(less))
    bare = run(models=(model("original", 3), replace(model("recovered", 1), long_context=untested())))
    assert any("certified without: needle at 16384" in one for one in summary.cautions(bare))


def test_a_proof_stands_beside_its_tolerance(page: str) -> None:
    assert "within the tolerance of 0.002 for a token and of 1.00e-04 for the mean of 1,024." in visible(page)
    assert "within the tolerance of 0.001 (rounding alone moves those of" in visible(page)
    assert "by 2.60e-05)." in visible(page)


def test_an_interval_that_holds_1_is_not_said_to_show_that_nothing_was_lost() -> None:
    for text in (visible(html(run())), markdown(run())):
        assert "a loss of up to its upper end is compatible with the data" in text
        assert "shows no loss" not in text
        assert "shows no change" not in text


def test_a_window_that_was_not_measured_to_its_end_is_not_claimed() -> None:
    data = run(claimed_length=65536)
    assert "is set to read 65,536 tokens instead of 8,192, measured up to 16,384" in summary.verdict(data)
    shown = {number.label: (number.value, number.detail) for number in summary.key_numbers(data)}
    assert shown["Context length"] == ("65,536", "tokens, was 8,192; measured up to 16,384")
    unmeasured = replace(CASES["without evaluate"], claimed_length=65536)
    assert "of which nothing was measured" in summary.verdict(unmeasured)


def test_same_losses_stand_beside_their_tolerance(page: str) -> None:
    assert "same losses (a token's differs by at most 2.40e-07 nats, tolerance 0.002)" in visible(page).replace(
        "&#39;", "'"
    )


def test_the_training_stands_in_numbers(page: str) -> None:
    said = "on 204,800 tokens in 200 steps, LoRA rank 16, learning rate 0.001, 498 tokens/s"
    assert said in visible(page)
    assert said in markdown(run())


def test_continuations_stand_side_by_side(page: str) -> None:
    for text in (visible(page), markdown(run())):
        assert "When water is heated to 100 degrees," in text
        assert "The beginning of argparse.py" in text
        assert "/home/somebody" not in text
        assert text.count("which rises into the air") == 2
        assert text.count("the water boils, and the steam rises") == 2
    assert "What they write" not in visible(html(CASES["nothing written"]))


def test_the_use_of_context_comes_back_from_the_journal_as_it_went() -> None:
    for label in ("original", "recovered"):
        assert restored(jsonable(long_context(label))) == long_context(label)  # type: ignore[arg-type]
    assert restored(jsonable(LongContext(512))) == LongContext(512)  # type: ignore[arg-type]


def test_render_writes_the_files(tmp_path) -> None:
    files = render(run(), tmp_path / "run")
    assert {path.name for path in files} == {"report.html", "report.md", "perplexity.svg", "perplexity.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in files}
    assert "![Perplexity against context length](perplexity.png)" in (tmp_path / "run" / "report.md").read_text()
    assert {path.name for path in render(EMPTY, tmp_path / "empty")} == {"report.html", "report.md"}
