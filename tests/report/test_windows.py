"""What report and card say of sliding windows: which layers, which sinks, and what was lost."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from retrofit.evaluation.cache_change import cache_change
from retrofit.kv_heads.repair.outcome import RepairOutcome
from retrofit.model.spec import cache_lengths
from retrofit.publishing.card import render_card
from retrofit.publishing.card_input import Recovery, Windows
from retrofit.report.render import html, markdown
from retrofit.report.sections import costs, summary
from retrofit.views.measured import cache_sizes
from retrofit.windows import sentences
from retrofit.windows.outcome import Choice, Rise, WindowLayerReport, WindowReport
from retrofit.workflow.artifact import Provenance, as_json
from retrofit.workflow.certify import _windows
from tests.publishing.cards import card_input
from tests.report.made_up import run

LAYERS = (
    WindowLayerReport(0, 1024, 7, 0.25, 0.5, 0.125, (RepairOutcome("o_proj", True, 0.5, 0.25),)),
    WindowLayerReport(1, 1024, 9, 0.1, 0.2, 0.05, (RepairOutcome("o_proj", False, 0.5, 0.5),)),
    WindowLayerReport(2, None),
)
REPORT = WindowReport(
    "granite_swa", 1024, (2,), Rise(0.0, 0.025, 0.34), LAYERS, Choice((2,), Rise(0.01, 0.119, 0.6), ()), 65_536,
    {"python-docs": 65_536}, 8192, 1.0,
)  # fmt: skip
FOUND = asdict(REPORT)


def test_sentences_name_layers_sinks_and_losses_before_and_after_the_repair() -> None:
    assert sentences.layers(FOUND) == "windows of 1,024 tokens in layers 0-1; layer 2 sees everything"
    assert sentences.sinks(FOUND) == (
        "16 of their query heads have an attention sink, 1 of 2 output projections are refitted"
    )
    everywhere = {**FOUND, "full_layers": (), "layers": [{**layer, "sinks": 0} for layer in FOUND["layers"]]}
    assert sentences.layers(everywhere) == "windows of 1,024 tokens in layers 0-2; no layer sees everything"
    assert sentences.sinks(everywhere).startswith("none of their query heads has an attention sink")
    text = sentences.losses(FOUND)
    assert "on 8,192 tokens that nothing was fitted on: text inside the window +0.000, text beyond it +0.025" in text
    assert (
        "before any repair: text inside the window +0.010, text beyond it +0.119, passages out of sight +0.600" in text
    )


def test_a_report_shows_every_layer_and_what_the_training_did() -> None:
    made = run(windows=FOUND, recovery=replace(run().recovery, passages=(0.34, 0.12)))  # type: ignore[type-var]
    for text in (markdown(made), html(made)):
        assert "windows of 1,024 tokens in layers 0-1" in text
        assert "Sliding windows, layer by layer" in text
        assert "loss of passages out of sight 0.340 → 0.120" in text
    assert "Sliding windows" not in markdown(run())


def test_a_card_says_which_layers_and_what_was_lost() -> None:
    windows = Windows(2, sentences.layers(FOUND), sentences.sinks(FOUND), sentences.losses(FOUND))
    trained = Recovery("distill", 150_000, 64, ("self",), 1e-3, 150.0, (70, 75), (0.34, 0.12))
    assert "150,000 tokens of the original's own samples and python-docs, through" in render_card(
        card_input(recovery=replace(trained, sources=("self", "python-docs")))
    )
    card = render_card(card_input(conversion=None, kv_heads=(3, 3), windows=windows, recovery=trained))
    assert "2 of its 30 layers look back a fixed number of tokens only, so the KV cache is 3 times smaller" in card
    assert "## Sliding windows" in card
    assert "- windows of 1,024 tokens in layers 0-1; layer 2 sees everything." in card
    assert "sliding-window-attention" in card
    assert (
        "On held-out passages that come again from out of sight, the loss that was trained on went from 0.340 to"
        in card
    )
    assert "Sliding windows" not in render_card(card_input())


def test_heads_and_windows_share_the_credit() -> None:
    """3 to 1 heads, and 24 of 30 layers with windows of 1,024 tokens: 30 / (6 + 24 / 8) at 8,192 tokens."""
    before, after = 8192 * 23040, (6 * 8192 + 24 * 1024) * 256
    windows = Windows(24, sentences.layers(FOUND), sentences.sinks(FOUND), sentences.losses(FOUND))
    both: Any = {"kv_heads": (3, 1), "claimed_length": 8192, "context_method": None, "windows": windows}
    card = render_card(card_input(kv_cache_bytes={1024: (23_592_960, 7_864_320), 8192: (before, after)}, **both))
    assert "1 KV head instead of 3; the heads of each group were merged" in card
    assert "so the KV cache is 10 times smaller at 8,192 tokens (KV heads ÷ 3, windows ÷ 3.33)." in card
    assert "| 1,024 | 22.5 MiB | 7.50 MiB | ÷ 3 |" in card
    assert "| 8,192 | 180 MiB | 18.0 MiB | ÷ 10 |" in card
    sizes = {8192: (before, after), 32_768: (32_768 * 23040, (6 * 32_768 + 24 * 1024) * 256)}
    models = tuple(
        replace(one, kv_cache_bytes={tokens: size[one.label != "original"] for tokens, size in sizes.items()})
        for one in run().models
    )
    made = run(models=models, claimed_length=32_768, native_length=32_768, windows=FOUND)
    assert "now has a 13.3× smaller KV cache at 32,768 tokens (KV heads ÷ 3, windows ÷ 4.44);" in summary.verdict(made)
    number = next(one for one in summary.key_numbers(made) if one.label == "KV cache")
    assert number.value == "÷ 13.3"
    assert number.detail.endswith("at 32,768 tokens; KV heads ÷ 3, windows ÷ 4.44")
    assert [row[-1] for row in costs.memory(made).rows] == ["÷ 10", "÷ 13.3"]
    lines = [part for part in cache_sizes({one.label: one for one in models}) if isinstance(part, str)]
    assert lines == ["KV cache ÷ 13.3 at 32,768 tokens: KV heads ÷ 3, windows ÷ 4.44"]


def test_the_parts_of_a_smaller_cache_multiply_to_all_of_it() -> None:
    found = cache_change(8192, (1200, 25), (6, 2), (40, 5))  # half as wide values, too
    assert (found.heads, found.dtype, found.windows) == (3, 8 / 3, 6)
    assert found.heads * found.dtype * found.windows == found.ratio
    only = cache_change(8192, (300, 100), (3, 1))
    assert (only.parts, only.windowed, only.ratio) == ("", False, 3)
    alone = cache_change(8192, (300, 100), (3, 3))
    assert (alone.parts, alone.windowed, alone.windows) == ("", True, 3)
    assert cache_lengths(8192) == (8192,)
    assert cache_lengths(40_000) == (8192, 32_768, 40_000)
    assert cache_lengths(512) == (512,)


def test_a_record_that_is_none_of_windows_is_not_shown() -> None:
    recorded: Any = Provenance({}).after("window", {}, as_json(REPORT)).steps
    [step] = json.loads(json.dumps(recorded))
    assert "seconds" not in step["result"]
    assert _windows((step,)) == {**FOUND, "seconds": 0.0}
    assert _windows(({**step, "result": {**FOUND, "size": "<script>"}},)) is None
    assert _windows(({"step": "window"},)) is None
    assert _windows(()) is None
