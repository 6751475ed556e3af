"""Layer-wise transfer: what it trains on, what it is judged on, and that it keeps nothing that is worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.kv_heads.calibrate.stream import LayerStream
from retrofit.kv_heads.convert import CalibrationText, convert
from retrofit.kv_heads.merge.weights import LayerWeights, write_layer
from retrofit.kv_heads.repair import repairs
from retrofit.kv_heads.repair.outcome import ConvertReport, RepairOutcome
from retrofit.kv_heads.repair.transfer import LayerTransfer, split
from retrofit.model.families import describe
from retrofit.model.load import load_config
from tests.tiny import FAMILIES, save_tiny

FOLDS = [(kind, i % 2) for kind in "abc" for i in range(7)]


def test_one_kind_of_several_is_held_out_whole_and_another_in_each_layer() -> None:
    unseen = []
    for layer in range(3):
        train, held_out = split(FOLDS, layer)
        assert set(held_out) == set("abc")
        assert not set(train) & {i for out in held_out.values() for i in out}
        missing = {kind for kind, _ in FOLDS} - {FOLDS[i][0] for i in train}
        assert len(missing) == 1
        unseen.append(missing.pop())
        assert len(train) == 2 * 6, "six of seven batches of each other kind"
    assert sorted(unseen) == ["a", "b", "c"]


def test_of_a_single_kind_some_batches_are_held_out() -> None:
    train, held_out = split([("a", 0), ("a", 1)], 5)
    assert (train, held_out) == ([0], {"a": [1]})


@pytest.mark.parametrize("family", FAMILIES)
def test_attending_gives_what_the_layer_s_output_projection_gives(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    config = load_config(source)
    stream = LayerStream(config, describe(config), Checkpoint.open(source).tensor)
    hidden, kwargs = stream.embed(torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0)))
    with stream.layer(1) as run:
        _, wanted = run.forward(hidden, kwargs[1])
        parameters = run.attention_parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        found = run.attend(hidden, kwargs[1])
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-6)
        found.square().sum().backward()
        assert all(parameter.grad is not None for parameter in parameters.values())


def few_words(sequences: int = 48) -> CalibrationText:
    """Sequences over six tokens: what is learned on some of them holds on the others."""
    ids = torch.randint(0, 6, (sequences, 24), generator=torch.Generator().manual_seed(1))
    return CalibrationText(ids, tuple("ab"[i % 2] for i in range(sequences)))


def converted(
    source: Path, out: Path, repair: str, monkeypatch: pytest.MonkeyPatch, **settings: float
) -> ConvertReport:
    chain = (repairs.OutputRidge(), LayerTransfer(**settings)) if repair == "transfer" else (repairs.OutputRidge(),)
    monkeypatch.setattr(repairs, "REPAIRS", {repair: chain})
    out.mkdir()
    return convert(source, out, kv_heads=1, repair=repair, text=few_words(), averaged_tokens=0)


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 6, (4, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def test_transfer_brings_the_model_nearer_to_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    wanted = logits(source)
    errors = {}
    for repair in ("o_proj", "transfer"):
        report = converted(source, tmp_path / repair, repair, monkeypatch, passes=60.0)
        errors[repair] = float((logits(tmp_path / repair) - wanted).square().mean())
    transfer = report.layers[0].repairs[1]
    assert transfer.accepted
    assert transfer.held_out_after < 0.6 * transfer.held_out_before
    assert errors["transfer"] < 0.8 * errors["o_proj"], errors


def test_what_is_not_written_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", "phi", qk_layernorm=True)
    before, unwritten = Checkpoint.open(source), []

    class Watched(LayerTransfer):
        def __call__(
            self, inputs: repairs.RepairInputs, weights: LayerWeights
        ) -> tuple[LayerWeights, repairs.RepairOutcome]:
            result = super().__call__(inputs, weights)
            assert result[1].accepted
            for name in inputs.run.attention_parameters().keys() - write_layer(weights, inputs.layer).keys():
                unwritten.append(name.split("self_attn.")[1])
                assert torch.equal(inputs.run.attention_parameters()[name], before.tensor(name)), name
            return result

    monkeypatch.setattr(repairs, "REPAIRS", {"transfer": (repairs.OutputRidge(), Watched(passes=20.0))})
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", kv_heads=1, repair="transfer", text=few_words(), averaged_tokens=0)
    assert sorted(unwritten) == 2 * ["k_layernorm.bias"] + 2 * ["q_layernorm.bias"]


def test_a_descent_that_makes_it_worse_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    converted(source, tmp_path / "o_proj", "o_proj", monkeypatch)
    report = converted(source, tmp_path / "transfer", "transfer", monkeypatch, learning_rate=1e4)
    for layer in report.layers:
        assert [(outcome.name, outcome.accepted) for outcome in layer.repairs][1] == ("transfer", False)
        assert layer.repairs[1].held_out_after == layer.repairs[1].held_out_before
    before, after = Checkpoint.open(tmp_path / "o_proj"), Checkpoint.open(tmp_path / "transfer")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)


@pytest.mark.parametrize("zero", [("o_proj",), ("k_proj", "v_proj")])
def test_a_layer_that_gives_nothing_has_nothing_to_train(
    zero: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    stored = load_file(source / "model.safetensors")
    changed = {f"model.layers.0.self_attn.{name}.weight" for name in zero}
    stored = {name: torch.zeros_like(t) if name in changed else t for name, t in stored.items()}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    report = converted(source, tmp_path / "out", "transfer", monkeypatch)
    assert report.layers[0].repairs[1] == RepairOutcome("transfer", False, 0.0, 0.0)
