"""What a choice is measured on beside passages: numbers that are asked for, and tokens that need the far context."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from retrofit.data.calibration import CalibrationText
from retrofit.model.folder import ModelFolder
from retrofit.windows import NEEDLE_ROWS
from retrofit.windows.ablation import ablated_losses
from retrofit.windows.outcome import Limits
from retrofit.windows.probes import keys, needles, probes, short_contexts
from retrofit.windows.rows import Repeats, repeats
from retrofit.windows.selection import select
from tests.tiny import BOS_ID, save_tiny, tiny_model, tiny_tokenizer
from tests.windows.planted import LAYERS, RETRIEVES, random_text, save_planted

WINDOW = 16


def letters(length: int, *, bos: bool) -> CalibrationText:
    """Three sequences of letters, each of which is a token."""
    chosen = random.Random(0)
    tokenizer, begin = tiny_tokenizer(), [BOS_ID] * bos
    rows = [begin + tokenizer("".join(chosen.choices("abcxyz ", k=length - bos))).input_ids for _ in range(3)]
    return CalibrationText(torch.tensor(rows), ("a", "b", "a"))


@pytest.mark.parametrize("bos", [False, True])
def test_numbers_are_asked_for_when_no_fact_is_in_sight(bos: bool) -> None:
    window, tokenizer = 512, tiny_tokenizer()
    given = letters(4 * window, bos=bos)
    rows = repeats(given, window, 2, bos=bos)
    found = needles(tokenizer, given, rows)
    assert found is not None
    assert found.input_ids_NR.shape == found.counted_NR.shape == (NEEDLE_ROWS, 2 * window)
    for ids, counted, body in zip(found.input_ids_NR, found.counted_NR, given.input_ids_NT, strict=False):
        assert (int(ids[0]) == BOS_ID) == bos
        words = tokenizer.decode(ids[int(bos) :])
        asked = words.index("\n\nThe special magic number for ")
        assert words[asked:].count("magic number for") == words[:asked].count("magic number for") == 4
        answers = tokenizer.decode(ids[1:][counted[:-1]]).split()
        assert len(answers) == 4
        for answer in answers:
            assert answer.isdigit()
            assert words.count(answer) == 2, "in the fact, and as the answer"
            assert words.index(f"{answer}.") + len(f"{answer}.") <= asked - window
        last = words[:asked].rindex(".") + 1 + bos
        prose = ids[last : asked + bos]
        assert torch.equal(prose, body[len(body) - len(prose) :]), "the end of the sequence"
    few = letters(256, bos=bos)
    assert needles(tokenizer, few, repeats(few, 64, 2, bos=bos)) is None


def stock_losses(ids_NR: Tensor) -> Tensor:
    with torch.no_grad():
        logits = tiny_model("qwen2")(ids_NR).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids_NR[:, 1:].flatten(), reduction="none").view(
        len(ids_NR), -1
    )


def measured(window: int) -> Repeats:
    given = CalibrationText(random_text(3, 4 * window), ("a", "b", "a"))
    return repeats(given, window, 2, bos=False)


@pytest.mark.usefixtures("exact_products")
def test_a_short_context_is_what_the_last_window_or_half_of_it_holds(tmp_path: Path) -> None:
    model, rows = ModelFolder(save_tiny(tmp_path, "qwen2")), measured(WINDOW)
    short = short_contexts(rows)
    (found_NS,) = ablated_losses(model, short, [frozenset()], {})
    for start, losses in zip((WINDOW // 2, WINDOW - 1), found_NS.split(2), strict=True):
        expected = stock_losses(rows.input_ids_NR[:, start : start + WINDOW + 1])
        torch.testing.assert_close(losses, expected[:, WINDOW // 2 :], atol=2e-5, rtol=1e-4)


def test_keys_are_far_tokens_that_become_likely_by_the_far_context() -> None:
    rows = measured(WINDOW)
    both = probes(rows, None)
    long_NP = torch.full((2, len(both.positions)), 1.0)
    short_NR = torch.full((2, rows.length), 2.5)  # of the token after each position
    for position, short in ((20, 3.5), (23, 3.5), (26, 9.0), (3, 9.0)):
        short_NR[0, position] = short
    long_NP[0, both.positions == 26] = 2.5  # is not likely
    starts, half = (WINDOW // 2, WINDOW - 1), WINDOW // 2
    short_NS = torch.cat([short_NR[:, start + half : start + WINDOW] for start in starts])
    found = keys(rows, both, long_NP, short_NS)
    assert both.positions[found[0]].tolist() == [20, 23], "not 3, which is no far one"
    assert not found[1].any()
    parts = both.with_keys(found).means(torch.arange(len(both.positions)).expand(2, -1))
    at = {int(position): index for index, position in enumerate(both.positions)}
    assert parts["keys"] == (at[20] + at[23]) / 2
    assert parts["needles"] is None


def test_needles_and_passages_are_measured_in_one_pass_each_by_its_own_rows() -> None:
    given = letters(2048, bos=True)
    rows = repeats(given, 512, 3, bos=True)
    hidden = needles(tiny_tokenizer(), given, rows)
    assert hidden is not None
    both = probes(rows, hidden)
    assert both.input_ids_NR.shape == (3 + NEEDLE_ROWS, 1024)
    losses_NP = torch.rand(len(both.input_ids_NR), len(both.positions))
    found = both.means(losses_NP)
    whole_NR = torch.zeros(len(losses_NP), 1024)
    whole_NR[:, both.positions] = losses_NP
    for part, expected in rows.means(whole_NR[:3, rows.positions]).items():
        assert found[part] == pytest.approx(expected)
    assert found["needles"] == pytest.approx(float(whole_NR[3:][hidden.counted_NR].mean()))
    assert both.tokens["needles"] == int(hidden.counted_NR.sum())


def test_the_layer_that_retrieves_is_found_by_text_that_repeats_itself(tmp_path: Path) -> None:
    window = 32
    body = random_text(16, 2 * window, seed=1)
    body[:, 40:52] = body[:, 2:14]
    rows = repeats(CalibrationText(body, ("a", "b") * 8), window, 16, bos=False)
    fit = CalibrationText(random_text(4, 128), ("a", "b") * 2)
    model = ModelFolder(save_planted(tmp_path / "model"))
    found = select(
        model, range(LAYERS), window, fit, rows, None, Limits(0.1, 0.1), full=None, sinks=False, work=tmp_path / "work"
    )
    assert found.tokens["keys"] > 100
    alone = {layer: added.keys for layer, added in found.rounds[0].added.items()}
    assert alone[RETRIEVES] is not None
    assert alone[RETRIEVES] > 2
    assert all(abs(alone[layer] or 0.0) < 0.05 for layer in range(RETRIEVES))
    assert found.rise.needles is None
    assert found.full == (RETRIEVES,)
