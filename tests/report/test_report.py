"""A report says what the data says, with or without any part of a run, and nothing in it can break the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from retrofit.console import jsonable
from retrofit.evaluation.metrics.context_use import LongContext, restored
from retrofit.evaluation.metrics.perplexity import loss_by_position
from retrofit.evaluation.result import ModelEvaluation
from retrofit.evaluation.running import BatchCost
from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
from retrofit.kv_heads.repair.outcome import LayerReport
from retrofit.publishing.gate import GateResult
from retrofit.report.charts import plots
from retrofit.report.charts.drawing import STYLES, Line
from retrofit.report.charts.figures import card_picture, figures
from retrofit.report.data import RunData, StepRecord
from retrofit.report.render import html, markdown, render
from retrofit.report.sections import costs, summary
from tests.report.made_up import conversion, effective, long_context, model, run, search


@pytest.fixture(scope="module")
def page() -> str:
    return html(run())


def visible(text: str) -> str:
    """What a reader reads: no style, no markup."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<(style|svg).*?</\1>", "", text, flags=re.DOTALL))


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


def test_tasks_are_shown_with_what_they_are_against_the_original() -> None:
    (shown,) = (one for one in figures(run()) if one.section == "tasks")
    rows = {row[:3]: row[3:] for row in shown.table.rows}
    assert rows["arc_easy", "acc", "original"] == ("0.612 ± 0.01", "–", "–", "–", "–", "2,376")
    paired = ("0.574 ± 0.01", "-0.038 [-0.049, -0.026]", "210", "120", "7.4e-07", "2,376")
    assert rows["arc_easy", "acc", "recovered"] == paired
    assert rows["lambada", "perplexity", "recovered"] == ("12.5", "–", "–", "–", "–", "5,153")
    assert "How it answers questions" in visible(html(run()))
    assert "| arc_easy | acc_norm |" in markdown(run())
    worse = [one for one in summary.cautions(run()) if "does worse" in one]
    assert worse[0] == "It does worse than the original on arc_easy, acc: -0.038 [-0.049, -0.026]."
    last = run().models[2]
    unsure = tuple(replace(one, high=0.001) for one in last.task_changes)
    maybe = run(models=(*run().models[:2], replace(last, task_changes=unsure)))
    assert not [one for one in summary.cautions(maybe) if "does worse" in one]
    without = tuple(replace(one, tasks=(), task_changes=()) for one in run().models)
    assert "How it answers questions" not in html(run(models=without))


def knowing(original: float, final: float, *, low: float = -0.3, high: float = -0.1) -> RunData:
    """A run whose models were asked common knowledge; low, high: of the difference."""
    first, _, last = run().models

    def score(value: float) -> tuple[TaskScore, ...]:
        return (TaskScore("common_knowledge", "acc_norm", value, 0.02, 504, 0, 0.25),)

    drop = original - final
    change = TaskChange("common_knowledge", "acc_norm", 504, original, final, -drop, low, high, drop, 1, 1, 0.1)
    return run(
        models=(
            replace(first, tasks=score(original), task_changes=()),
            replace(last, tasks=score(final), task_changes=(change,)),
        )
    )


def test_the_title_says_what_is_left_of_general_knowledge() -> None:
    found = knowing(0.58, 0.41)
    clause = "it answers 41% of 504 common-knowledge questions where the original answers 58% (chance 25%)"
    assert summary.verdict(found).endswith(f"; {clause}.")
    assert clause in markdown(found)
    assert clause in visible(html(found))
    (number,) = (one for one in summary.key_numbers(found) if one.label.startswith("Common knowledge"))
    assert number.value == "41%"
    assert number.detail == "the original 58%, chance 25%: 48% of what it answers beyond chance"
    assert "0.41 ± 0.02 (chance 0.25)" in markdown(found)
    assert "common-knowledge" not in summary.verdict(run())


def test_the_title_says_that_general_knowledge_is_gone() -> None:
    found = knowing(0.58, 0.27)
    clause = (
        "it answers 27% of 504 common-knowledge questions, which is not distinguishable from chance (25%), where the "
        "original answers 58%"
    )
    assert clause in summary.verdict(found)
    assert any("general knowledge is gone" in one for one in summary.cautions(found))
    assert not any("general knowledge is gone" in one for one in summary.cautions(knowing(0.58, 0.41)))
    (number,) = (one for one in summary.key_numbers(found) if one.label.startswith("Common knowledge"))
    assert number.detail == "the original 58%, chance 25%; not distinguishable from chance"


def test_the_title_says_where_no_general_knowledge_is_shown_to_be_lost() -> None:
    assert "(chance 25%; no difference is shown)" in summary.verdict(knowing(0.58, 0.57, low=-0.03, high=0.01))


def test_the_title_says_where_the_original_guesses_too() -> None:
    verdict = summary.verdict(knowing(0.26, 0.25, low=-0.03, high=0.01))
    assert "distinguishable from chance (25%), where the original answers 26%, by chance as well" in verdict
    (number,) = (one for one in summary.key_numbers(knowing(0.26, 0.25)) if one.label.startswith("Common"))
    assert "not distinguishable from chance" in number.detail


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
    assert "#ffffff" in written and "#010101" in written, "text stands out from dark and from light cells"


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


def test_a_proof_stands_beside_its_tolerance(page: str) -> None:
    assert "within the tolerance of 0.002 for a token and of 1.00e-04 for the mean of 1,024." in visible(page)
    assert "within the tolerance of 0.001 (rounding alone moves those of" in visible(page)
    assert "by 2.60e-05)." in visible(page)


def test_what_running_costs_stands_beside_what_the_machine_could_do() -> None:
    (found,) = (one for one in figures(run()) if one.title == "Speed and memory by context length")
    assert len(found.table.rows) == 4
    assert found.picture is not None
    assert found.table.rows[0] == (
        "512", "original", "11.2 MiB (spec: 11.2 MiB)", "0.731 (0.717 to 0.753)", "700", "1,450",
        "20.1 (19.5 to 20.5)", "33.8", "90.0 MiB",
    )  # fmt: skip
    assert found.picture.themed.count(">bound<") == 2
    assert "8.85 GiB/s" in found.caption
    bare = replace(run().models[0].cost.lengths[0], decode_tokens=0, decode_per_s=None, decode_rounds=())  # type: ignore[union-attr]
    only = replace(run().models[0], cost=replace(run().models[0].cost, lengths=(bare,)))  # type: ignore[type-var]
    (found,) = (one for one in figures(run(models=(only,))) if one.title == "Speed and memory by context length")
    assert found.picture is None
    assert found.table.rows[0][6] == "–"


def test_sequences_decoded_together_stand_beside_one_another() -> None:
    def with_batches(label: str, *graphs: float) -> ModelEvaluation:
        one = model(label, 3 if label == "original" else 1)
        assert one.cost is not None
        batches = tuple(
            BatchCost(count, count << 20, 9000.0, (15.0, 16.0, 15.5), (speed, speed + 1, speed + 2))
            for count, speed in zip((1, 32), graphs, strict=True)
        )
        skipped = BatchCost(64, 64 << 20, 9000.0, (), (), "not measured: it needs <b>")
        at = replace(one.cost.lengths[1], batches=(*batches, skipped))
        return replace(one, cost=replace(one.cost, lengths=(one.cost.lengths[0], at)))

    assert costs.decoding_together(run()) == ""
    assert costs.together(run()).rows == ()
    data = run(models=(with_batches("original", 200.0, 3000.0), with_batches("recovered", 201.0, 6000.0)))
    assert costs.decoding_together(data) == (
        "Decoding as a CUDA graph after 2,048 tokens, tokens/s: 1 at once 201 → 202 (no difference that the rounds "
        "tell), 32 at once 3,001 → 6,001 (2×)."
    )
    (found,) = (one for one in figures(data) if one.title == "Sequences decoded together")
    assert found.table.rows[2] == (
        "2,048", "32", "original", "32.0 MiB", "15.5 (15.0 to 16.0)", "3,001 (3,000 to 3,002)", "9,000", "–",
    )  # fmt: skip
    assert found.table.rows[4][4:6] == ("–", "–")
    assert "it needs &lt;b&gt;" in html(data)


def with_rounds(label: str, *rounds: tuple[float, ...]) -> ModelEvaluation:
    """A model of the run whose decoding was timed as given, at each length."""
    one = model(label, 3 if label == "original" else 1)
    assert one.cost is not None
    lengths = tuple(
        replace(at, decode_rounds=found, decode_per_s=float(np.median(found)))
        for at, found in zip(one.cost.lengths, rounds, strict=True)
    )
    return replace(one, cost=replace(one.cost, lengths=lengths))


def test_speeds_that_the_rounds_do_not_tell_apart_give_no_factor() -> None:
    steady, beside = (20.0, 20.1, 19.9, 20.2), (3.4, 20.0, 19.0, 3.5)
    data = run(
        models=(with_rounds("original", steady, beside), with_rounds("recovered", (25.0, 24.9, 25.1, 25.2), steady))
    )
    assert "Decoding speed" not in [number.label for number in summary.key_numbers(data)]
    said = costs.decoding(data)
    assert "Decoding after 512 tokens: 1.25× the original's speed, 1.23× to 1.27× over the rounds" in said
    assert (
        "Decoding after 2,048 tokens: no difference could be measured here (3.40 to 20.0 → 19.9 to 20.2 tokens/s: the "
        "rounds do not tell the models apart)." in said
    )
    assert "no difference could be measured here" in markdown(data)
    assert "no difference could be measured here" in visible(html(data))


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


def test_a_bound_far_above_what_was_reached_gets_a_logarithmic_axis() -> None:
    near, far = ([Line("original", [512, 2048], [y, y])] for y in (30.0, 30_000.0))
    reached = [Line("original", [512, 2048], [20.0, 18.0])]
    assert ">1,000<" not in plots.decode_by_context("a", reached, near).themed
    assert ">1,000<" in plots.decode_by_context("a", reached, far).themed


def test_the_use_of_context_comes_back_from_the_journal_as_it_went() -> None:
    for label in ("original", "recovered"):
        assert restored(jsonable(long_context(label))) == long_context(label)  # type: ignore[arg-type]
    assert restored(jsonable(LongContext(512))) == LongContext(512)  # type: ignore[arg-type]


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


def test_render_writes_the_files(tmp_path) -> None:
    files = render(run(), tmp_path / "run")
    assert {path.name for path in files} == {"report.html", "report.md", "perplexity.svg", "perplexity.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in files}
    assert "![Perplexity against context length](perplexity.png)" in (tmp_path / "run" / "report.md").read_text()
    assert {path.name for path in render(EMPTY, tmp_path / "empty")} == {"report.html", "report.md"}
