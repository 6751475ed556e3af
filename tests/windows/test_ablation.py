"""Variants measured together are those that a stock model with windows in these layers gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from retrofit.data.calibration import CalibrationText
from retrofit.errors import UserError
from retrofit.model.folder import ModelFolder
from retrofit.windows.ablation import ablated_losses
from retrofit.windows.rows import repeats, split
from retrofit.windows.sinks import NONE
from tests.tiny import save_tiny, tiny_model

WINDOW = 16
LAYERS = 4
NO_SINKS = {index: torch.full((4,), NONE) for index in range(LAYERS)}


def text(sequences: int = 8, length: int = 64) -> CalibrationText:
    ids = torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(1))
    return CalibrationText(ids, tuple("ab"[i % 2] for i in range(sequences)))


def stock_losses(ids_NR: Tensor, windowed: frozenset[int]) -> Tensor:
    """Of a Qwen2, which has windows by layer."""
    types = ["sliding_attention" if index in windowed else "full_attention" for index in range(LAYERS)]
    over = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": types}
    model = tiny_model("qwen2", num_hidden_layers=LAYERS, **over)
    with torch.no_grad():
        logits = model(ids_NR).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids_NR[:, 1:].flatten(), reduction="none").view(
        len(ids_NR), -1
    )


@pytest.mark.usefixtures("exact_products")
def test_every_variant_is_the_stock_model_with_those_windows(tmp_path: Path) -> None:
    model = ModelFolder(save_tiny(tmp_path, "qwen2", num_hidden_layers=LAYERS))
    rows = repeats(text(), WINDOW, 3, bos=False)
    variants = [frozenset[int](), frozenset({1}), frozenset({1, 3}), frozenset(range(4)), frozenset({2, 3})]
    found = ablated_losses(model, rows, variants, NO_SINKS)
    for variant, losses in zip(variants, found, strict=True):
        expected = stock_losses(rows.input_ids_NR, variant)[:, rows.positions]
        torch.testing.assert_close(losses, expected, atol=2e-5, rtol=1e-4)
    same = [variants[0], variants[0]]
    together = ablated_losses(model, rows, same, NO_SINKS)
    assert torch.equal(together[0], together[1])


def test_variants_that_have_no_room_together_are_measured_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelFolder(save_tiny(tmp_path, "qwen2", num_hidden_layers=LAYERS))
    rows = repeats(text(), WINDOW, 2, bos=False)
    variants = [frozenset({1}), frozenset[int](), frozenset({0, 3})]
    together = ablated_losses(model, rows, variants, NO_SINKS)
    monkeypatch.setattr("retrofit.windows.ablation.STREAM_BYTES", 1)
    assert torch.equal(ablated_losses(model, rows, variants, NO_SINKS), together)


@pytest.mark.parametrize("bos", [False, True])
def test_a_second_copy_lies_outside_the_window_of_the_first(bos: bool) -> None:
    rows = repeats(text(), WINDOW, 5, bos=bos)
    ids, passage = rows.input_ids_NR, 2 * WINDOW // 8
    assert rows.length == 2 * WINDOW
    assert rows.kinds == ("a", "b", "a", "b", "a")
    copy = rows.length - passage
    assert torch.equal(ids[:, copy:], ids[:, int(bos) : int(bos) + passage])
    assert copy - int(bos) > WINDOW, "the token after the first copy's is hidden too"
    parts = rows.parts
    assert parts["near"].tolist() == list(range(0, WINDOW, 4))
    assert parts["far"].tolist() == list(range(WINDOW, copy - 1)), "the next token is text, the copy's first is not"
    assert parts["answers"].tolist() == list(range(copy, rows.length - 1))
    losses = rows.positions.float().expand(5, -1)
    assert rows.means(losses) == {name: pytest.approx(float(part.float().mean())) for name, part in parts.items()}


def test_sequences_shorter_than_a_row_are_refused() -> None:
    with pytest.raises(UserError, match="too short to look beyond a window of 64"):
        repeats(text(), 64, 2, bos=False)


def test_what_is_measured_on_is_not_fitted_on() -> None:
    fit, measured = split(text(), 3)
    assert (len(fit.kinds), len(measured.kinds)) == (5, 3)
    assert measured.kinds == ("a", "b", "a")
    whole = {tuple(row) for part in (fit, measured) for row in part.input_ids_NT.tolist()}
    assert len(whole) == 8
