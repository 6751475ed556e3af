"""What inspection says, against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass

import pytest

from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.model.inspect import inspect, ranges
from retrofit.model.source import resolve
from tests.tiny import FAMILIES, save_tiny, tiny_model


@dataclass(frozen=True)
class Finding:
    severity: str
    what: str


def test_values_of_a_sliding_family(tmp_path):
    folder = save_tiny(tmp_path, "gemma3_text", dtype="bfloat16")
    found = inspect(folder, findings=[Finding("warning", "example")])
    assert (found.architecture, found.family) == ("Gemma3ForCausalLM", "gemma3_text")
    assert (found.layers, found.query_heads, found.kv_heads, found.head_dim) == (2, 4, 4, 16)
    sliding, full = found.groups
    assert (sliding.indices, sliding.window, full.indices, full.window) == ("0", 32, "1", None)
    assert (sliding.rope.theta, full.rope.theta) == (10_000.0, 1_000_000.0)
    assert sliding.qk_norm == "RMS norm over each head"
    assert sliding.scaling == 24**-0.5
    # K and V, 4 heads of 16 values of 2 bytes: 256 bytes a token and layer; the sliding layer keeps 32 tokens.
    assert found.kv_bytes_per_token == 512
    assert found.kv_cache_bytes == {tokens: 256 * (tokens + 32) for tokens in (8192, 32_768, 131_072)}
    assert [(c.kv_heads, c.possible) for c in found.conversions] == [(1, True), (2, True), (3, False), (4, True)]
    assert found.conversions[0].kv_cache_bytes[8192] == found.kv_cache_bytes[8192] // 4
    assert "does not divide" in found.conversions[2].reason
    assert json.loads(json.dumps(asdict(found)))["findings"] == [{"severity": "warning", "what": "example"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_with_and_without_weights(tmp_path, family):
    folder = save_tiny(tmp_path, family)
    expected = sum(parameter.numel() for parameter in tiny_model(family).parameters())
    assert inspect(folder).parameters == expected
    (folder / "model.safetensors").unlink()
    assert inspect(folder).parameters == expected


def test_equal_layers_are_told_together(tmp_path):
    folder = save_tiny(tmp_path, "smollm3", num_hidden_layers=8, no_rope_layer_interval=4)
    with_rope, without = inspect(resolve(folder)).groups
    assert (with_rope.indices, with_rope.count, without.indices, without.count) == ("0-2, 4-6", 6, "3, 7", 2)
    assert without.rope is None
    assert ranges([]) == ""


def test_biases_pairing_and_partial_rotary(tmp_path):
    (phi,) = inspect(save_tiny(tmp_path / "phi", "phi")).groups
    assert (phi.biases, phi.rope.rotary_dim, phi.rope.pairing) == (("q", "k", "v", "o"), 8, "half")
    (cohere,) = inspect(save_tiny(tmp_path / "cohere", "cohere")).groups
    assert (cohere.biases, cohere.rope.pairing) == ((), "interleaved")


def test_windows_and_sinks_of_granite_swa(tmp_path):
    folder = save_tiny(tmp_path, "granite_swa", num_key_value_heads=2, dtype="bfloat16")
    found = inspect(folder)
    full, sliding = found.groups
    assert (full.window, full.sinks, full.rope.theta) == (None, True, 50_000.0)
    assert (sliding.window, sliding.sinks, sliding.rope.theta) == (16, True, 1000.0)
    assert full.scaling == 0.2
    assert (found.kv_bytes_per_token, found.kv_bytes_beyond_windows) == (2 * 128, 128)
    assert found.kv_cache_bytes[8192] == 128 * (8192 + 16)
    assert [group.kv_cache_bytes[32_768] for group in found.groups] == [128 * 32_768, 128 * 16]
    assert not any(group.sinks for group in inspect(save_tiny(tmp_path / "llama")).groups)


def test_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(UserError, match="`bloom` is not supported"):
        inspect(tmp_path)


def test_what_is_re_expressed_is_shown_as_what_it_becomes(tmp_path, monkeypatch):
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(
        '{"model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, '
        '"intermediate_size": 96, "vocab_size": 264, "rotary_pct": 0.5}'
    )
    found = inspect(tmp_path / "m")
    assert (found.family, found.kv_heads, found.head_dim) == ("phi", 4, 16)
    assert [c.kv_heads for c in found.conversions if c.possible] == [1, 2, 4]
    assert found.groups[0].rope.rotary_dim == 8


def test_weights_are_not_read(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path)
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr("safetensors.safe_open", lambda *args, **kwargs: pytest.fail("a weight file was opened"))
    assert inspect(folder).layers == 2


def test_imports_without_torch():
    code = """
        import sys, retrofit.model.inspect, retrofit.model.source
        assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
