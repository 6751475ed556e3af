"""The choice of full layers on a model whose retrieval head is known, and what a stop leaves of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.console import Silent
from retrofit.data.calibration import CalibrationText
from retrofit.model.folder import ModelFolder
from retrofit.windows import ablation
from retrofit.windows.outcome import Choice, Limits
from retrofit.windows.rows import Repeats, repeats
from retrofit.windows.selection import select
from tests.windows.planted import LAYERS, RETRIEVES, random_text, save_planted

WINDOW = 32


def given() -> tuple[CalibrationText, Repeats]:
    fit = CalibrationText(random_text(4, 128), ("a", "b") * 2)
    rows = repeats(CalibrationText(random_text(16, 64, seed=1), ("a", "b") * 8), WINDOW, 16, bos=False)
    return fit, rows


def chosen(model: ModelFolder, work: Path, **over: Any) -> Choice:
    fit, rows = given()
    usual: dict[str, Any] = {"full": None, "sinks": False, **over}
    return select(model, range(LAYERS), WINDOW, fit, rows, None, Limits(0.1, 0.1), work=work, **usual)


def test_the_layer_that_retrieves_is_the_one_that_sees_everything(tmp_path: Path) -> None:
    found = chosen(ModelFolder(save_planted(tmp_path / "model")), tmp_path / "work")
    alone = found.rounds[0].added
    assert alone[RETRIEVES].answers > 2, "the model does retrieve"
    assert max(abs(alone[layer].answers) for layer in range(RETRIEVES)) < 0.05
    assert found.full == (RETRIEVES,)
    assert abs(found.rise.answers) < 0.05
    assert found.ranking[0] == RETRIEVES


def test_it_is_the_one_where_one_is_asked_for(tmp_path: Path) -> None:
    found = chosen(ModelFolder(save_planted(tmp_path / "model")), tmp_path / "work", full=1)
    assert found.full == (RETRIEVES,)


def test_layers_that_always_have_windows_are_part_of_every_measurement(tmp_path: Path) -> None:
    model, (fit, rows) = ModelFolder(save_planted(tmp_path / "model")), given()
    usual: dict[str, Any] = {"full": None, "sinks": False, "work": tmp_path / "work"}
    found = select(model, (0, 1, 2), WINDOW, fit, rows, None, Limits(0.1, 0.1), always=(RETRIEVES,), **usual)
    assert found.rounds[0].rise.answers > 2
    assert found.rise.answers > 2
    assert found.full == ()


def test_a_choice_that_was_stopped_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelFolder(save_planted(tmp_path / "model"))
    calm = chosen(model, tmp_path / "calm")
    passes: list[int] = []
    losses = ablation._Pass.losses

    def counted(self: ablation._Pass) -> torch.Tensor:
        passes.append(len(self._variants))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return losses(self)

    monkeypatch.setattr(ablation._Pass, "losses", counted)
    with pytest.raises(KeyboardInterrupt):
        chosen(model, tmp_path / "work")
    assert chosen(model, tmp_path / "work") == calm
    assert len(passes) == 4, "the first round is measured once"
    notes = Silent()
    assert chosen(model, tmp_path / "work", progress=notes) == calm
    assert len(passes) == 4
