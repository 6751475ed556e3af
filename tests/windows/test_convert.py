"""Windows written into checkpoints: the stock class gives what was fitted, and every part is what its formula says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrofit.checkpoint.read import Checkpoint
from retrofit.console import Silent
from retrofit.data.calibration import CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.disk import StreamFolder
from retrofit.model.folder import ModelFolder
from retrofit.windows.convert import add_windows
from retrofit.windows.layerwise import NO_SINK, Windows
from retrofit.windows.outcome import Rise, WindowLayerReport
from retrofit.windows.rows import Repeats, repeats
from tests.tiny import save_tiny

SIZE = 16
THREE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention"] * 3,
    "layer_rope_theta": [1e4, 1e6, 0],
}


def given(rows: int = 8) -> tuple[CalibrationText, Repeats]:
    ids = torch.randint(0, 256, (rows + 4, 64), generator=torch.Generator().manual_seed(1))
    text = CalibrationText(ids[:rows], tuple("ab"[i % 2] for i in range(rows)))
    return text, repeats(CalibrationText(ids[rows:], tuple("abab")), SIZE, 4, bos=False)


def made(
    folder: Path, out: Path, windowed: set[int], *, repair: bool, sinks: bool = True, **over: Any
) -> tuple[list[WindowLayerReport], Rise]:
    out.mkdir(exist_ok=True)
    text, rows = given()
    windows = Windows(SIZE, frozenset(windowed), sinks, repair)
    return add_windows(ModelFolder(folder), out, windows, text, rows, work=Path(f"{out}.work"), **over)


def losses(folder: Path, ids_NT: Tensor) -> Tensor:
    model = ModelFolder(folder).load()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(ids_NT).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids_NT[:, 1:], reduction="none")


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("family", ["granite_swa", "granitemoe_swa", "qwen2", "gemma2"])
def test_the_stock_model_has_the_loss_that_was_measured_layer_by_layer(
    tmp_path: Path, family: str, repair: bool
) -> None:
    given_thetas = {"layer_rope_theta": THREE["layer_rope_theta"]} if family.endswith("_swa") else {}
    three = {"num_hidden_layers": 3, "layer_types": THREE["layer_types"], **given_thetas}
    over: dict[str, Any] = {} if family == "gemma2" else three
    source = save_tiny(tmp_path / "source", family, **over)
    windowed = {0, 1} if family == "gemma2" else {0, 2}
    reports, rise = made(source, tmp_path / "out", windowed, repair=repair)
    _, rows = given()
    before, after = (
        rows.means(losses(folder, rows.input_ids_NR)[:, rows.positions]) for folder in (source, tmp_path / "out")
    )
    for part in before:
        assert getattr(rise, part) == pytest.approx(after[part] - before[part], abs=2e-5)
    assert [report.window for report in reports] == [SIZE if i in windowed else None for i in range(len(reports))]
    written = ModelFolder(tmp_path / "out").spec
    assert [layer.window for layer in written.layers] == [report.window for report in reports]


@pytest.mark.usefixtures("exact_products")
def test_sinks_are_written_where_a_layer_has_a_window_and_stay_where_it_has_none(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "granite_swa", layer_types=["full_attention"] * 2)
    reports, _ = made(source, tmp_path / "out", {1}, repair=False)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    names = [f"model.layers.{index}.self_attn.sinks" for index in range(2)]
    assert torch.equal(before.tensor(names[0]), after.tensor(names[0]))
    assert not torch.equal(before.tensor(names[1]), after.tensor(names[1]))
    assert int((after.tensor(names[1]) > NO_SINK).sum()) == reports[1].sinks
    changed = {name for name in before.names if not torch.equal(before.tensor(name), after.tensor(name))}
    assert changed == {names[1]}
    bare, _ = made(source, tmp_path / "bare", {1}, repair=False, sinks=False)
    assert bare[1].sinks == 0
    assert bool((Checkpoint.open(tmp_path / "bare").tensor(names[1]) == NO_SINK).all())
    assert bare[1].lost == pytest.approx(bare[1].bare)
    assert reports[1].lost <= reports[1].bare


@pytest.mark.usefixtures("exact_products")
def test_a_bias_gives_back_the_mean_of_what_is_lost(tmp_path: Path) -> None:
    """By the weights that errors have: one over the energy of the stream that the layer reads."""
    source = save_tiny(tmp_path / "source", "granite_swa", layer_types=["full_attention"] * 2, attention_bias=True)
    made(source, tmp_path / "out", {0}, repair=False)
    text, _ = given()
    found = {}
    for folder in (source, tmp_path / "out"):
        model = ModelFolder(folder).load()
        model.set_attn_implementation("eager")
        layer, kept = model.model.layers[0], {}
        layer.register_forward_pre_hook(lambda _, given, kept=kept: kept.update(hidden=given[0]))
        layer.self_attn.register_forward_hook(lambda _, given, out, kept=kept: kept.update(out=out[0]))
        with torch.no_grad():
            model(text.input_ids_NT)
        found[folder] = kept
    weights_NT1 = found[source]["hidden"].square().sum(-1, keepdim=True).reciprocal()
    lost_NTC = found[source]["out"] - found[tmp_path / "out"]["out"]
    mean_C, size = (weights_NT1 * lost_NTC).sum((0, 1)), (weights_NT1 * lost_NTC.abs()).sum((0, 1))
    assert bool((mean_C.abs() < 0.05 * size).all())
    names = {name for name in Checkpoint.open(source).names if "layers.0.self_attn" in name}
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    changed = {
        name.rpartition("self_attn.")[2] for name in names if not torch.equal(before.tensor(name), after.tensor(name))
    }
    assert changed == {"sinks", "o_proj.bias"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("exact_products")
def test_a_repair_lowers_the_error_on_text_left_out_or_leaves_the_weights(tmp_path: Path, bias: bool) -> None:
    """A bias has the mean of what is lost in any case; of random text that is all that there is to give back."""
    source = save_tiny(tmp_path / "source", "granite_swa", layer_types=["full_attention"] * 2, attention_bias=bias)
    reports, _ = made(source, tmp_path / "out", {0, 1}, repair=True)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for index, report in enumerate(reports):
        name = f"model.layers.{index}.self_attn.o_proj"
        kinds = ("weight", "bias") if bias else ("weight",)
        same = [torch.equal(before.tensor(f"{name}.{kind}"), after.tensor(f"{name}.{kind}")) for kind in kinds]
        [repair] = report.repairs
        assert repair.held_out_after <= repair.held_out_before
        assert same[0] == (not repair.accepted)
        assert not any(same[1:])
    assert bias or any(report.repairs[0].accepted for report in reports)


def test_a_conversion_that_was_stopped_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", "granite_swa", **THREE)
    calm = made(source, tmp_path / "calm", {0, 2}, repair=True)
    finished = StreamFolder.finished

    def stopped(self: StreamFolder, layer: int) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        finished(self, layer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamFolder, "finished", stopped)
        made(source, tmp_path / "hunted", {0, 2}, repair=True)
    notes = Silent()
    assert made(source, tmp_path / "hunted", {0, 2}, repair=True, progress=notes) == calm
    assert any("resume after 1 of 3 layers" in note for note in notes.notes)
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()} for name in ("calm", "hunted")
    )
    assert one == other


def test_windows_that_an_architecture_cannot_hold_are_refused_before_any_work(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    with pytest.raises(UserError, match="its class has no sliding window"):
        made(source, tmp_path / "out", {0}, repair=False)
    assert not (tmp_path / "out.work").exists()
