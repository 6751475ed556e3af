"""The room that is asked for before a conversion is the room that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrofit.kv_heads.calibrate.residuals import WorkFolder
from retrofit.kv_heads.convert import CalibrationText, convert
from retrofit.kv_heads.room import held, room_needed
from retrofit.model.families import describe
from retrofit.model.load import load_config
from tests.tiny import save_tiny


@pytest.mark.parametrize("repair", ["none", "o_proj"])
def test_streams_layers_and_moments_are_counted(repair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, work = save_tiny(tmp_path / "source", "qwen2", num_hidden_layers=3), tmp_path / "work"
    most: list[int] = []
    dropped = WorkFolder.drop_streams
    monkeypatch.setattr(WorkFolder, "drop_streams", lambda self: (most.append(held(work)), dropped(self)))
    ids = torch.randint(0, 256, (16, 256), generator=torch.Generator().manual_seed(1))
    (tmp_path / "out").mkdir()
    text = CalibrationText(ids, tuple("ab" * 8))
    convert(source, tmp_path / "out", kv_heads=2, repair=repair, text=text, work=work, moments=tmp_path / "moments")
    asked = room_needed(
        describe(load_config(source)),
        2,
        ids.numel(),
        repairs=repair != "none",
        moments=True,
        value_bytes=4,
        checkpoint_bytes=0,
    )
    assert most[0] < 1.01 * asked < 1.05 * most[0], "but for headers"
