"""Conversion of every family: identity, every divisor, exactness where heads are copies, stock reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import retrofit
from retrofit.checkpoint.read import Checkpoint
from retrofit.data import calibration
from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.stream import LayerStream
from retrofit.kv_heads.convert import CalibrationText, convert
from retrofit.kv_heads.merge.joint import rotary_indices
from retrofit.kv_heads.merge.weights import read_layer, write_layer
from retrofit.model.families import describe
from retrofit.model.load import load_config
from tests.tiny import FAMILIES, save_tiny, tiny_model

LOSSLESS = [f for f in FAMILIES if f not in {"qwen3", "gemma3_text", "olmo2", "qwen3_moe", "olmoe"}]
ONE_OR_ALL = {"gpt_bigcode"}  # its class holds one KV head, or one for each query head


def text(sequences: int = 8, length: int = 48) -> CalibrationText:
    ids = torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(1))
    return CalibrationText(ids, tuple("ab"[i % 2] for i in range(sequences)))


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(ids).logits


def run(source: Path, out: Path, **options: object) -> Path:
    out.mkdir()
    convert(source, out, **options)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["mean", "calibrated"])
def test_identity_keeps_every_byte_of_the_weights(family: str, method: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    out = run(source, tmp_path / "out", kv_heads=4, method=method, text=text())
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    assert set(before.names) == set(after.names)
    assert all(torch.equal(before.tensor(n), after.tensor(n)) for n in before.names)
    ids = torch.randint(0, 256, (1, 40))
    assert torch.equal(logits(source, ids), logits(out, ids))


def test_a_model_that_has_so_many_heads_already_needs_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*_: object, **__: object) -> CalibrationText:
        raise AssertionError

    monkeypatch.setattr(calibration, "calibration_text", unread)
    source = save_tiny(tmp_path / "source", "llama", chat_template=True)
    report = retrofit.convert(source, out=tmp_path / "out", kv_heads=4).report
    assert report["tokens"] == 0
    assert report["kv_heads_before"] == report["kv_heads_after"] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_divisor_reloads_in_stock_transformers_and_generates(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    ids = torch.randint(0, 256, (1, 12))
    for kv_heads, method in ((2, "first"), (1, "mean"), (2, "calibrated"), (1, "calibrated")):
        if kv_heads == 2 and family in ONE_OR_ALL:
            continue
        out = run(source, tmp_path / f"{method}{kv_heads}", kv_heads=kv_heads, method=method, text=text())
        model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert model.config.num_key_value_heads == kv_heads
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        whole = model(generated[:, :-1]).logits[0, 11:].argmax(-1)
        assert torch.equal(generated[0, 12:], whole), "decoding with a cache agrees with one pass"


def with_twin_heads(family: str, folder: Path, maps: str = "any") -> Path:
    """KV heads 0 and 2, 1 and 3 (or all four) are exact linear twins: keys turned and scaled pair by pair, values
    mapped. maps: "any" such map, "orthogonal" ones only, or "real" ones (scales of pairs) only."""
    twins = ((0, 1), (0, 2), (0, 3)) if family in ONE_OR_ALL else ((0, 2), (1, 3))
    model = tiny_model(family)
    spec = describe(model.config)
    state = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in spec.layers:
            weights = read_layer(lambda name: state[name].detach(), layer)
            x, y, rest = rotary_indices(layer.rope, layer.head_dim)
            for old, new in twins:
                a = torch.complex(*torch.randn(2, len(x), generator=generator))
                mix = torch.randn(layer.head_dim, layer.head_dim, generator=generator) * 0.3
                turn = torch.randn(len(rest), len(rest), generator=generator) * 0.5
                if maps == "orthogonal":
                    a, mix, turn = a / a.abs(), torch.linalg.qr(mix)[0], torch.linalg.qr(turn)[0]
                elif maps == "real":
                    a = a.real.to(a.dtype)
                for tensor in (weights.k_KDC, weights.k_bias_KD):
                    if tensor is not None:
                        z = torch.complex(tensor[old][x], tensor[old][y])
                        z = z * (a[:, None] if z.ndim == 2 else a)
                        tensor[new][x], tensor[new][y] = z.real, z.imag
                        tensor[new][rest] = turn @ tensor[old][rest]
                for tensor in (weights.v_KDC, weights.v_bias_KD):
                    if tensor is not None:
                        tensor[new] = mix @ tensor[old]
            for name, tensor in write_layer(weights, layer).items():
                state[name].copy_(tensor)
    save_tiny(folder, family)  # for the tokenizer
    model.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("family", LOSSLESS)
def test_calibrated_finds_twin_heads_and_loses_nothing(family: str, tmp_path: Path) -> None:
    source = with_twin_heads(family, tmp_path / "source")
    ids = torch.randint(0, 256, (1, 40))
    want = logits(source, ids)
    kv_heads = 1 if family in ONE_OR_ALL else 2
    calibrated = run(source, tmp_path / "calibrated", kv_heads=kv_heads, repair="none", text=text(16))
    assert torch.allclose(logits(calibrated, ids), want, atol=2e-3 * float(want.abs().max()))
    mean = run(source, tmp_path / "mean", kv_heads=kv_heads, method="mean")
    assert not torch.allclose(logits(mean, ids), want, atol=1e-2 * float(want.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_one_by_one_as_in_the_whole_model(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    config = load_config(source)
    spec = describe(config)
    ids = torch.randint(0, 256, (2, 40))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        want = model(ids, output_hidden_states=True).hidden_states
    stream = LayerStream(config, spec, Checkpoint.open(source).tensor)
    hidden, kwargs = stream.embed(ids)
    assert torch.equal(hidden, want[0])
    for layer in spec.layers:
        with stream.layer(layer.index) as run_:
            hidden, attention = run_.forward(hidden, kwargs[layer.index])
            assert attention.shape == hidden.shape
        if layer.index + 1 < len(spec.layers):
            assert torch.allclose(hidden, want[layer.index + 1], atol=1e-5)
    last = model.get_submodule(spec.layers_path.rpartition(".")[0])
    norm = next(m for name, m in last.named_children() if name in ("norm", "final_layernorm", "ln_f"))
    assert torch.allclose(norm(hidden), want[-1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_reordered_heads_compute_the_same_function(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, 256, (1, 20))
    state = dict(model.named_parameters())
    with torch.no_grad():
        want = model(ids).logits
        for layer in describe(model.config).layers:
            weights = read_layer(lambda name: state[name].detach().clone(), layer)
            for name, tensor in write_layer(weights.reorder((2, 0, 3, 1)), layer).items():
                state[name].copy_(tensor)
        assert torch.allclose(model(ids).logits, want, atol=1e-4)


def test_grouped_sources_and_shards_and_bf16(tmp_path: Path) -> None:
    source = save_tiny(
        tmp_path / "source",
        "llama",
        dtype="bfloat16",
        max_shard_size="40KB",
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    assert len(Checkpoint.open(source).shards) > 1
    out = run(source, tmp_path / "out", kv_heads=2, text=text())
    checkpoint = Checkpoint.open(out)
    assert {checkpoint.dtype(n) for n in checkpoint.names} == {torch.bfloat16}
    assert logits(out, torch.zeros(1, 5, dtype=torch.long)).isfinite().all()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    a, b = (run(source, tmp_path / name, kv_heads=2, text=text()) for name in "ab")
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("family", "announced"), [("olmo2", True), ("granite", False), ("llama", False)])
def test_a_repair_that_cannot_undo_earlier_layers_says_so(family: str, announced: bool, tmp_path: Path) -> None:
    source, out = save_tiny(tmp_path / "source", family), tmp_path / "out"
    out.mkdir()
    report = convert(source, out, kv_heads=2, text=text())
    assert any("not the error of the layers before" in note for note in report.notes) == announced


def test_a_repair_undoes_the_error_of_earlier_layers_through_a_residual_multiplier(tmp_path: Path) -> None:
    """The same function with the factor in the configuration and in the weights is converted to the same function."""
    stated = save_tiny(tmp_path / "stated", "granite", residual_multiplier=0.5)
    model = AutoModelForCausalLM.from_pretrained(stated)
    model.config.residual_multiplier = 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "folded")
    ids = torch.randint(0, 256, (1, 20))
    torch.testing.assert_close(logits(tmp_path / "folded", ids), logits(stated, ids), rtol=0, atol=1e-5)
    a, b = (run(tmp_path / name, tmp_path / f"{name}-2", kv_heads=2, text=text()) for name in ("stated", "folded"))
    torch.testing.assert_close(logits(b, ids), logits(a, ids), rtol=0, atol=1e-4)
    without = run(stated, tmp_path / "none", kv_heads=2, text=text(), repair="none")
    assert (logits(without, ids) - logits(a, ids)).abs().max() > 1e-2


def test_refusals(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="3"):
        convert(source, out, kv_heads=3, method="mean")
    with pytest.raises(UserError, match="needs text"):
        convert(source, out, kv_heads=2, method="calibrated")
    one = CalibrationText(torch.zeros(1, 32, dtype=torch.long), ("a",))
    with pytest.raises(UserError, match="too little calibration text"):
        convert(source, out, kv_heads=2, method="calibrated", text=one)
    assert not any(out.iterdir())


def test_reports_say_what_each_layer_lost_and_what_fell_back(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "phi", qk_layernorm=True)
    out = tmp_path / "out"
    out.mkdir()
    report = convert(source, out, kv_heads=1, text=text())
    assert report.kv_heads_before == 4 and report.kv_heads_after == 1 and report.tokens == 8 * 48
    assert report.kinds == ("a", "b")
    assert any("keys are mean-pooled" in note for note in report.notes)
    for layer in report.layers:
        assert layer.keys is None and layer.values is not None and 0 < layer.values < 1
        (repair,) = layer.repairs
        assert repair.name == "o_proj" and repair.held_out_after <= repair.held_out_before
