"""Windows by several processes: the choice and the weights of one, and what a kill leaves is resumed by any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from retrofit.console import Silent
from retrofit.data.calibration import CalibrationText
from retrofit.model.folder import ModelFolder
from retrofit.system.world import ALONE, World
from retrofit.windows import ablation, layerwise, survey
from retrofit.windows.convert import add_windows
from retrofit.windows.layerwise import Windows
from retrofit.windows.moments import TENSORS
from retrofit.windows.outcome import Choice, Limits, Rise, WindowLayerReport
from retrofit.windows.rows import Repeats, repeats
from retrofit.windows.selection import select
from retrofit.windows.store import load
from tests.ranks import fail_after, on_ranks
from tests.tiny import save_tiny
from tests.windows.planted import LAYERS, RETRIEVES, random_text, save_planted

SIZE = 16

pytestmark = pytest.mark.usefixtures("exact_products")


def given(parts: tuple[int, ...], rows: int) -> tuple[CalibrationText, Repeats]:
    """parts: sequences of each kind to fit on."""
    kinds = tuple(kind for kind, count in zip("ab", parts, strict=False) for _ in range(count))
    text = CalibrationText(random_text(len(kinds), 64, seed=1), kinds)
    return text, measured_on(random_text(rows, 64, seed=2), SIZE)


def measured_on(ids_NT: torch.Tensor, window: int) -> Repeats:
    kinds = tuple("ab"[i % 2] for i in range(len(ids_NT)))
    return repeats(CalibrationText(ids_NT, kinds), window, len(kinds), bos=False)


def windowed(
    world: World, source: Path, folder: Path, parts: tuple[int, ...] = (3, 5), rows: int = 10, stop: int | None = None
) -> tuple[list[WindowLayerReport], Rise, list[str]]:
    """Reports, what the loss rises by, and notes of this process. stop: after so many writes of a batch rank 0
    fails."""
    text, measured = given(parts, rows)
    out, notes = folder / "out", Silent()
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
    world.wait()
    if stop is not None and world.main:
        fail_after(stop)
    windows = Windows(SIZE, frozenset({0, 2}), sinks=True, repair=True)
    usual: dict[str, Any] = {"work": folder / "work", "world": world, "progress": notes}
    with patch.object(layerwise, "TOKENS_PER_BATCH", 128):  # two sequences, or four rows
        reports, rise = add_windows(ModelFolder(source), out, windows, text, measured, **usual)
    return reports, rise, notes.notes


def three_layers(folder: Path, *, bias: bool = False) -> Path:
    three = {"layer_types": ["full_attention"] * 3, "layer_rope_theta": [1e4] * 3, "attention_bias": bias}
    return save_tiny(folder, "granite_swa", num_hidden_layers=3, **three)


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...], folder: Path) -> None:
    """The same weights to the rounding of sums in float64, and the same decisions."""
    weights, others = (load_file(folder / name / "out/model.safetensors") for name in ("one", "many"))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=1e-6, msg=name)
    for a, b in zip(one[0], other[0], strict=True):
        assert (a.index, a.window, a.sinks) == (b.index, b.window, b.sinks)
        assert b.lost == pytest.approx(a.lost, rel=1e-6)
        assert [repair.accepted for repair in a.repairs] == [repair.accepted for repair in b.repairs]
    for part in ("near", "far", "answers"):
        assert getattr(other[1], part) == pytest.approx(getattr(one[1], part), abs=1e-6)


@pytest.mark.parametrize(
    ("ranks", "parts", "rows", "bias"),
    [(2, (3, 5), 10, False), (3, (2, 5), 3, True), pytest.param(5, (2, 2), 2, False, marks=pytest.mark.slow)],
)
def test_the_weights_are_those_of_one_process(
    ranks: int, parts: tuple[int, ...], rows: int, bias: bool, tmp_path: Path
) -> None:
    """Also where the sequences of a kind, or the rows that are measured on, are fewer than the processes."""
    source = three_layers(tmp_path / "source", bias=bias)
    alone = windowed(ALONE, source, tmp_path / "one", parts, rows)
    found = on_ranks(tmp_path, ranks, windowed, source, tmp_path / "many", parts, rows)
    assert all(rank[:2] == found[0][:2] for rank in found)
    assert_same(alone, found[0], tmp_path)


def test_a_stopped_conversion_is_resumed_by_another_number_of_processes(tmp_path: Path) -> None:
    source = three_layers(tmp_path / "source")
    alone = windowed(ALONE, source, tmp_path / "one")
    with pytest.raises(AssertionError, match="rank 0"):
        on_ranks(tmp_path, 2, windowed, source, tmp_path / "many", (3, 5), 10, 45)
    found = windowed(ALONE, source, tmp_path / "many")
    assert any("windows resume after" in note for note in found[2])
    assert_same(alone, found, tmp_path)


def chosen(world: World, source: Path, work: Path, rows: int = 10, stop: int | None = None) -> Choice:
    window, notes = 32, Silent()
    fit = CalibrationText(random_text(5, 128), ("a", "b", "a", "b", "a"))
    measured = measured_on(random_text(rows, 64, seed=1), window)
    if stop is not None and world.main:
        fail_after(stop)
    usual: dict[str, Any] = {"full": None, "sinks": False, "work": work, "world": world, "progress": notes}
    with patch.object(survey, "TOKENS_PER_BATCH", 256), patch.object(ablation, "TOKENS_PER_BATCH", 256):
        return select(ModelFolder(source), range(LAYERS), window, fit, measured, None, Limits(0.1, 0.1), **usual)


@pytest.mark.parametrize(("ranks", "rows"), [(2, 10), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_the_choice_is_that_of_one_process(ranks: int, rows: int, tmp_path: Path) -> None:
    """Batches of the rows, each read whole by one process, give the losses of one process to the last bit."""
    source = save_planted(tmp_path / "source")
    alone = chosen(ALONE, source, tmp_path / "one", rows)
    found = on_ranks(tmp_path, ranks, chosen, source, tmp_path / "many", rows)
    assert all(choice == found[0] for choice in found)
    assert found[0].full == (RETRIEVES,)
    assert found[0] == alone
    for index in range(LAYERS):
        first, second = (load(tmp_path / name / "moments", index) for name in ("one", "many"))
        for part in ("text", "answers"):
            assert getattr(first, part).tokens == getattr(second, part).tokens
            for name in TENSORS:
                one, other = (getattr(getattr(own, part), name) for own in (first, second))
                torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def test_one_process_goes_on_with_a_choice_that_several_began(tmp_path: Path) -> None:
    source = save_planted(tmp_path / "source")
    alone = chosen(ALONE, source, tmp_path / "one")
    with pytest.raises(AssertionError, match="rank 0"):
        on_ranks(tmp_path, 2, chosen, source, tmp_path / "many", 10, 40)
    assert chosen(ALONE, source, tmp_path / "many") == alone
