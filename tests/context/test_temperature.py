"""An attention factor in the weights of the queries does what one on cos and sin does, in stock transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retrofit.checkpoint.provenance import write_provenance
from retrofit.checkpoint.read import Checkpoint
from retrofit.context import rope
from retrofit.context.engines import unread
from retrofit.context.search.candidates import candidates
from retrofit.context.search.encoded import encoded
from retrofit.errors import UserError
from retrofit.recipe.schema import RopeSettings
from tests.tiny import FAMILIES, ONE_ENCODING, save_tiny, tiny_config

WANTED = 1.31
LEARNED = ("gpt_bigcode",)
BASE = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}


def rotary_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "rope_type")]


@pytest.mark.parametrize("method", ["yarn", "ntk"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LEARNED])
def test_the_weights_hold_the_factor(tmp_path, family: str, method: str) -> None:
    source = save_tiny(tmp_path / "source", family, **ONE_ENCODING.get(family, {}))
    settings = RopeSettings(attention_factor=WANTED)
    done = rope.write_extended(source, tmp_path / "plain", factor=4, method=method)
    assert (done.query_scale == 1) == (family != "phi3" or method == "ntk")
    written = rope.write_extended(source, tmp_path / "out", factor=4, method=method, settings=settings)
    # The configuration is that of the method's own factor: all engines read it alike.
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()
    assert any("Attention factor 1.31" in note for note in written.notes)
    ids = torch.randint(5, 60, (1, 48), generator=torch.Generator().manual_seed(2))
    load = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.inference_mode():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **load)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **load)
        own = plain(ids).logits
        for module in rotary_modules(plain):
            name = "full_attention_attention_scaling"
            scale = WANTED / done.query_scale**0.5  # what the plain one's own weights hold is not to count twice
            setattr(module, name if hasattr(module, name) else "attention_scaling", scale)
        expected = plain(ids).logits
        # And so does the search, before anything is written.
        before = AutoModelForCausalLM.from_pretrained(source, **load)
        with encoded(before, plain.config, written.query_scale):
            searched = before(ids).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(searched, expected, atol=2e-5, rtol=1e-4)
    assert (expected - own).abs().max() > 20 * (got - expected).abs().max()


def test_sliding_layers_keep_theirs_in_a_file_of_the_older_names(tmp_path) -> None:
    """Gemma 3 as the hub has it: one theta for full layers, `rope_local_base_freq` for sliding ones."""
    source = save_tiny(tmp_path / "source", "gemma3_text")
    raw = json.loads((source / "config.json").read_text())
    thetas = {name: value["rope_theta"] for name, value in raw.pop("rope_parameters").items()}
    raw |= {"rope_theta": thetas["full_attention"], "rope_local_base_freq": thetas["sliding_attention"]}
    (source / "config.json").write_text(json.dumps(raw))
    settings = RopeSettings(attention_factor=WANTED)
    rope.write_extended(source, tmp_path / "out", factor=4, method="yarn", settings=settings)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for index, kind in enumerate(raw["layer_types"]):
        name = f"model.layers.{index}.self_attn.q_norm.weight"
        assert torch.equal(before.tensor(name), after.tensor(name)) == (kind == "sliding_attention"), index


def test_only_queries_are_rewritten(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "llama", dtype="bfloat16")
    settings = RopeSettings(attention_factor=1.0)
    written = rope.write_extended(source, tmp_path / "out", factor=4, method="yarn", settings=settings)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert before.names == after.names
    for name in before.names:
        assert after.dtype(name) == torch.bfloat16
        same = torch.equal(before.tensor(name), after.tensor(name))
        assert same == ("q_proj" not in name), name
    name = next(name for name in before.names if "q_proj" in name)
    expected = (before.tensor(name).float() * written.query_scale).bfloat16()
    assert torch.equal(after.tensor(name), expected)
    assert written.query_scale < 1
    assert not unread(AutoConfig.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("again", [None, 1.0, 1.2])
def test_a_further_extension_divides_the_earlier_factor_out(tmp_path, again: float | None) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    first, then = RopeSettings(attention_factor=1.3), RopeSettings(attention_factor=again)
    done = rope.write_extended(source, tmp_path / "half", factor=2, method="yarn", settings=first)
    write_provenance(tmp_path / "half", {"steps": [{"step": "extend", "result": {"query_scale": done.query_scale}}]})
    twice = rope.write_extended(tmp_path / "half", tmp_path / "twice", factor=2, method="yarn", settings=then)
    rope.write_extended(source, tmp_path / "once", factor=4, method="yarn", settings=then)
    assert any("divided out" in note for note in twice.notes)
    once, got = (Checkpoint.open(tmp_path / name) for name in ("once", "twice"))
    for name in once.names:
        torch.testing.assert_close(got.tensor(name), once.tensor(name), rtol=1e-5, atol=1e-7)
    # And so does the search of one.
    config = AutoConfig.from_pretrained(tmp_path / "half")
    assert candidates(config, length=2048, count=1, held=done.query_scale)[0].query_scale == 1 / done.query_scale


def test_a_factor_that_the_configuration_writes_out_is_kept_or_said_to_go() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256}
    written = tiny_config("llama", rope_parameters={**yarn, "attention_factor": 1.0})
    after, done = (do(written, factor=2, method="yarn") for do in (rope.extend, rope.plan))
    assert after.rope_parameters["attention_factor"] == 1.0
    assert "attention factor 1 out: it is kept" in done.notes[-1]
    other = rope.extend(written, factor=2, method="yarn", settings=RopeSettings(attention_factor=1.2))
    assert "attention_factor" not in other.rope_parameters
    own = tiny_config(
        "llama", rope_parameters={**yarn, "attention_factor": rope.frequencies({**BASE, "rope_parameters": yarn})[1]}
    )
    assert "attention_factor" not in rope.extend(own, factor=2, method="yarn").rope_parameters
    lists = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    longrope = tiny_config("llama", rope_parameters={**yarn, **lists, "rope_type": "longrope", "attention_factor": 1.5})
    settings = RopeSettings(short_factor=(1.0,) * 8, long_factor=(2.0,) * 8)
    done = rope.plan(longrope, factor=2, method="longrope", settings=settings)
    assert "attention factor 1.5 out: it went" in done.notes[-1]


def test_clamped_queries_are_refused(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "olmo", clip_qkv=8.0)
    settings = RopeSettings(attention_factor=WANTED)
    with pytest.raises(UserError, match="clamps its queries"):
        rope.write_extended(source, tmp_path / "out", factor=4, method="yarn", settings=settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not read `attention_factor`"):
        rope.extend(tiny_config("llama"), factor=4, method="none", settings=settings)
