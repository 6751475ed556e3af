"""The survey of a whole model: its moments are those of each layer on the stream that enters it, and it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrofit.console import Silent
from retrofit.data.calibration import CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.stream import LayerStream
from retrofit.kv_heads.disk import StreamFolder
from retrofit.kv_heads.merge.weights import read_layer
from retrofit.model.folder import ModelFolder
from retrofit.windows.moments import TENSORS, WindowSums
from retrofit.windows.rows import Repeats, repeats
from retrofit.windows.store import LayerMoments, layer_file, load, saved
from retrofit.windows.survey import survey, token_weights
from tests.tiny import save_tiny, tiny_model

WINDOWS = (8, 16)


def given(tokens: int = 64) -> tuple[CalibrationText, Repeats]:
    ids = torch.randint(0, 256, (8, tokens), generator=torch.Generator().manual_seed(1))
    text = CalibrationText(ids[:6], tuple("ab"[i % 2] for i in range(6)))
    return text, repeats(CalibrationText(ids[6:], ("a", "b")), 16, 2, bos=False)


def same(one: LayerMoments, other: LayerMoments) -> bool:
    pairs = ((one.text, other.text), (one.answers, other.answers))
    return all(
        a.windows == b.windows
        and a.tokens == b.tokens
        and all(torch.equal(getattr(a, n), getattr(b, n)) for n in TENSORS)
        for a, b in pairs
    )


@pytest.mark.parametrize("windows", [WINDOWS, (16,)])
@pytest.mark.usefixtures("exact_products")
def test_moments_are_those_of_each_layer_on_the_stream_that_enters_it(tmp_path: Path, windows: tuple[int, ...]) -> None:
    """Also with one window, which flash attention computes."""
    folder, (text, rows) = save_tiny(tmp_path / "model"), given()
    survey(ModelFolder(folder), text, rows, windows, tmp_path / "moments", work=tmp_path / "work")
    assert saved(tmp_path / "moments") == (0, 1)
    assert not list((tmp_path / "work").glob("original-*")), "the streams are gone"
    model = ModelFolder(folder)
    stream = LayerStream(model.config, model.spec, model.checkpoint.tensor, captures=True)
    with torch.no_grad():
        hidden = tiny_model("llama")(text.input_ids_NT, output_hidden_states=True).hidden_states[1]
    _, kwargs = stream.embed(text.input_ids_NT)
    with stream.layer(1) as run:
        sums = WindowSums(windows, read_layer(model.checkpoint.tensor, model.spec.layers[1]).o_CHD)
        sums.add(run.attention_inputs(hidden, kwargs[1]), token_weights(hidden))
    expected, found = sums.finish(1), load(tmp_path / "moments", 1)
    assert found.text.tokens == 6 * 64
    assert found.answers.windows == (16,)
    assert found.answers.tokens == 2 * len(rows.parts["answers"])
    assert float(found.answers.weight_2W[0]) == 0, "answers lie beyond the window"
    for name in TENSORS:
        torch.testing.assert_close(getattr(found.text, name), getattr(expected, name), rtol=1e-3, atol=1e-6)


def test_a_survey_that_was_stopped_resumes_and_ends_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (text, rows) = ModelFolder(save_tiny(tmp_path / "model", num_hidden_layers=3)), given()
    survey(model, text, rows, WINDOWS, tmp_path / "calm", work=tmp_path / "calm.work")
    finished = StreamFolder.finished

    def stopped(self: StreamFolder, layer: int) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        finished(self, layer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamFolder, "finished", stopped)
        survey(model, text, rows, WINDOWS, tmp_path / "hunted", work=tmp_path / "work")
    notes = Silent()
    survey(model, text, rows, WINDOWS, tmp_path / "hunted", work=tmp_path / "work", progress=notes)
    assert any("resumes after 1 of 3 layers" in note for note in notes.notes)
    for index in range(3):
        assert same(load(tmp_path / "calm", index), load(tmp_path / "hunted", index))


def test_broken_moments_are_an_error_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no moments of windows of layer 3"):
        load(tmp_path, 3)
    layer_file(tmp_path, 3).write_bytes(b"broken")
    with pytest.raises(UserError, match="layer 3 cannot be read"):
        load(tmp_path, 3)
