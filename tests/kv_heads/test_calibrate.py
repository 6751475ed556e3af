"""The layer-by-layer run: what it reads and keeps, what it says, and the chain of repairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retrofit.checkpoint.read import Checkpoint
from retrofit.context.rope import extend
from retrofit.kv_heads.calibrate.layerwise import CalibratedRun
from retrofit.kv_heads.calibrate.moments import load, saved
from retrofit.kv_heads.calibrate.settings import Settings
from retrofit.kv_heads.convert import CalibrationText, convert
from retrofit.kv_heads.merge.baselines import METHODS
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer
from retrofit.kv_heads.repair.outcome import RepairOutcome
from retrofit.kv_heads.repair.repair_inputs import RepairInputs
from retrofit.kv_heads.repair.repairs import OutputRidge
from retrofit.model.families import describe, family_of
from retrofit.model.load import load_config
from tests.children.sitecustomize import BFLOAT16
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a product change its last digits, and what is read ahead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(sequences: int = 8, length: int = 48) -> CalibrationText:
    ids = torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(1))
    return CalibrationText(ids, tuple("ab"[i % 2] for i in range(sequences)))


def test_moments_are_kept_where_asked_and_the_work_folder_holds_no_streams(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    (tmp_path / "out").mkdir()
    report = convert(
        source, tmp_path / "out", kv_heads=2, text=text(), work=tmp_path / "work", moments=tmp_path / "moments"
    )
    assert saved(tmp_path / "moments") == (0, 1)
    moments = load(tmp_path / "moments", 1)
    assert moments.tokens == 8 * 48 == report.tokens
    assert moments.averaged_tokens == 2 * 48
    assert moments.stream_energy is not None
    assert moments.stream_energy > 0
    assert report.tokens_by_kind == {"a": 192, "b": 192}
    names = {path.name for path in (tmp_path / "work" / "calibration").iterdir()}
    assert names == {"state.json", "layer-000.safetensors", "layer-001.safetensors", "moments"}
    assert not list((tmp_path / "out").glob(".*")), "nothing but the checkpoint"


def test_a_calibration_multiplies_as_the_processor_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bfloat16_products: bool
) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    for folder, told in (("float32", "no"), ("here", "yes" if bfloat16_products else "no")):
        monkeypatch.setenv(BFLOAT16, told)
        (tmp_path / folder).mkdir()
        convert(source, tmp_path / folder, kv_heads=2, text=text(), repair="none")
    name = "model.layers.1.self_attn.k_proj.weight"
    exact, here = (Checkpoint.open(tmp_path / folder).tensor(name) for folder in ("float32", "here"))
    off = float((exact - here).abs().max() / exact.abs().max())
    assert (0 < off < 0.05) if bfloat16_products else off == 0


def test_keys_are_merged_for_the_window_that_they_will_be_read_in(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    config = load_config(source)
    longer = extend(config, factor=8.0, method="yarn")
    found = {}
    for name, read_with in (("own", None), ("same", config), ("longer", longer)):
        (tmp_path / name).mkdir()
        convert(source, tmp_path / name, kv_heads=1, repair="none", text=text(), averaged_tokens=0, read_with=read_with)
        written = Checkpoint.open(tmp_path / name)
        found[name] = {part: written.tensor(f"model.layers.0.self_attn.{part}_proj.weight") for part in "kv"}
        assert written.config["max_position_embeddings"] == config.max_position_embeddings
    assert torch.equal(found["own"]["k"], found["same"]["k"])
    assert torch.equal(found["own"]["v"], found["longer"]["v"])
    assert not torch.allclose(found["own"]["k"], found["longer"]["k"], atol=1e-3)


def test_averaged_values_change_the_values_and_nothing_of_the_keys(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    found = []
    for name, tokens in (("with", 8192), ("without", 0)):
        (tmp_path / name).mkdir()
        convert(source, tmp_path / name, kv_heads=1, repair="none", text=text(), averaged_tokens=tokens)
        checkpoint = Checkpoint.open(tmp_path / name)
        found.append({part: checkpoint.tensor(f"model.layers.0.self_attn.{part}_proj.weight") for part in "kv"})
    assert torch.equal(found[0]["k"], found[1]["k"])
    assert not torch.allclose(found[0]["v"], found[1]["v"])


def test_pooling_reads_no_tensor_that_it_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", "llama", max_shard_size="40KB")
    (tmp_path / "out").mkdir()
    read: list[str] = []
    whole = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or whole(self, name))
    convert(source, tmp_path / "out", kv_heads=2, method="mean")
    assert sorted(read) == sorted(f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "kv")


def test_a_fit_with_few_tokens_a_column_is_announced_with_what_to_raise(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    notes = {}
    for sequences in (8, 70):
        out = tmp_path / str(sequences)
        out.mkdir()
        notes[sequences] = convert(source, out, kv_heads=2, text=text(sequences), averaged_tokens=0).notes
    assert any("64 columns on 384 calibration tokens, 6.0 a column" in note and "3,200" in note for note in notes[8])
    assert not any("a column" in note for note in notes[70])


def test_keys_that_are_fitted_through_a_norm_say_when_the_text_is_too_short(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "qwen3", attention_bias=True)
    (tmp_path / "out").mkdir()
    report = convert(source, tmp_path / "out", kv_heads=2, repair="none", text=text())
    assert any("normalised keys fits 33 columns on 384 calibration tokens" in note for note in report.notes)


class Doubled:
    """A repair that doubles the queries, and notes what it was given. accepted: what it says of itself."""

    name = "doubled"

    def __init__(self, accepted: bool) -> None:
        self.accepted = accepted
        self.heads: list[tuple[torch.Tensor, torch.Tensor]] = []

    def columns(self, heads: int, head_dim: int, bias: bool) -> int:
        return 0

    def __call__(self, inputs: RepairInputs, weights: LayerWeights) -> tuple[LayerWeights, RepairOutcome]:
        for i in range(len(inputs.folds)):
            self.heads.append((inputs.heads(i), inputs.run.head_outputs(inputs.hidden(i), inputs.kwargs(i))))
            assert inputs.target(i).shape == inputs.hidden(i).shape
            assert inputs.weight(i).shape == inputs.hidden(i).shape[:2]
        return replace(weights, q_HDC=weights.q_HDC * 2), RepairOutcome(self.name, self.accepted, 0.5, 0.25)


@pytest.mark.parametrize("accepted", [True, False])
def test_repairs_work_on_what_the_ones_before_them_left(accepted: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    checkpoint, config = Checkpoint.open(source), load_config(source)
    target = family_of(config).with_kv_heads(config, 2)
    weights = {}
    first, second = Doubled(accepted), Doubled(False)
    for name, repairs in (("none", ()), ("chain", (first, second))):
        run = CalibratedRun(
            checkpoint,
            config,
            target,
            Settings(2, METHODS["calibrated"], "calibrated", repairs),
            text(),
            work=tmp_path / name,
            device="cpu",
            dtype=None,
            progress=None,
        )
        reports = run.all_layers()
        stored = dict(run.work.tensor_names())
        weights[name] = read_layer(
            lambda n, run=run, stored=stored: run.work.tensor(stored[n], n), describe(target).layers[0]
        )
    assert [(o.name, o.accepted) for o in reports[1].repairs] == [("doubled", accepted), ("doubled", False)]
    factor = 2 if accepted else 1
    assert torch.equal(weights["chain"].q_HDC, factor * weights["none"].q_HDC)
    for known, fresh in (*first.heads, *second.heads):
        assert torch.equal(known, fresh), "head outputs are those of the present weights"
    changed = not torch.allclose(first.heads[0][0], second.heads[0][0])
    assert changed == accepted


def test_the_ridge_counts_its_columns() -> None:
    assert OutputRidge().columns(4, 16, False) == 64
    assert OutputRidge().columns(4, 16, True) == 65
