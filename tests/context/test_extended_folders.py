"""Folders with a longer context: what is written, and what stock transformers loads from them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retrofit.context import rope
from retrofit.context.fields import as_dict, views
from retrofit.errors import UserError
from retrofit.model.frequencies import varying
from retrofit.recipe.schema import RopeSettings
from tests.context.rotary import computed, options, plain, rotary, rotary_pairs, tiny_model_from
from tests.tiny import save_tiny, tiny_config, tiny_model


@pytest.mark.parametrize("method", rope.METHODS)
@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text", "phi3"])
def test_saved_folder_loads_the_same_frequencies(tmp_path, family: str, method: str, monkeypatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, modeling_rope_utils

    said: list[str] = []
    monkeypatch.setattr(modeling_rope_utils.logger, "warning", said.append)
    source = save_tiny(tmp_path / "source", family)
    out = tmp_path / "out"
    asked = options(method, rotary_pairs(tiny_config(family)))
    done = rope.write_extended(source, out, length=1536, **asked)
    assert (done.original, done.length, done.factor) == (512, 1536, 3.0)
    layer_type = "full_attention" if family == "gemma3_text" else None
    raw = json.loads((out / "config.json").read_text())
    fresh = AutoConfig.from_pretrained(out)
    wanted, scale = rope.frequencies(rope.extend(tiny_config(family), length=1536, **asked), layer_type)
    for source_of_truth in (raw, fresh, old_names_only(raw)):
        got, got_scale = rope.frequencies(source_of_truth, layer_type)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        assert got_scale == pytest.approx(scale)
    assert fresh.max_position_embeddings == 1536
    assert said == []
    model = AutoModelForCausalLM.from_pretrained(out)
    got, got_scale = computed(model, layer_type)
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    assert got_scale == pytest.approx(scale)
    assert not [one for one in rope.lint_folder(out) if one.severity == "error"]
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 1536
    weights = out / "model.safetensors"
    same = weights.read_bytes() == (source / "model.safetensors").read_bytes()
    assert same == (done.query_scale == 1)
    assert not weights.samefile(source / "model.safetensors")


def test_weights_are_hard_links_only_where_that_is_asked_for(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    rope.write_extended(source, tmp_path / "copied", factor=2, method="yarn")
    rope.write_extended(source, tmp_path / "linked", factor=2, method="yarn", link=True)
    assert (source / "model.safetensors").stat().st_nlink == 2
    assert (tmp_path / "linked" / "model.safetensors").samefile(source / "model.safetensors")


@pytest.mark.parametrize(("before", "after"), [(512, 1024), (20, 20)])
def test_generation_follows_the_window_where_it_had_the_old_one(tmp_path, before: int, after: int) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    (source / "generation_config.json").write_text(json.dumps({"max_length": before}))
    rope.write_extended(source, tmp_path / "out", length=1024, method="yarn")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"max_length": after}
    assert json.loads((source / "generation_config.json").read_text()) == {"max_length": before}


def old_names_only(raw):
    """config.json as an engine reads it that knows nothing of rope_parameters."""
    return {key: value for key, value in raw.items() if key != "rope_parameters"}


@pytest.mark.parametrize(
    ("family", "said"), [("llama", {}), ("llama", {"rope_scaling": {}}), ("phi", {"partial_rotary_factor": 0.5})]
)
def test_a_theta_left_to_the_class_is_written(tmp_path, family: str, said: dict[str, object]) -> None:
    """Llama 2's config.json says nothing about RoPE."""
    source = save_tiny(tmp_path / "source", family)
    raw = json.loads((source / "config.json").read_text())
    silent = {key: value for key, value in raw.items() if not key.startswith("rope")}
    (source / "config.json").write_text(json.dumps({**silent, **said}))
    done = rope.write_extended(source, tmp_path / "out", factor=4, method="ntk")
    explicit = rope.write_extended(save_tiny(tmp_path / "whole", family), tmp_path / "again", factor=4, method="ntk")
    assert done.length == explicit.length
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("method", rope.METHODS)
@pytest.mark.parametrize("family", ["llama", "stablelm", "gemma3_text"])
def test_old_names_load_in_stock_transformers(tmp_path, family: str, method: str) -> None:
    from transformers import AutoConfig

    config = rope.extend(tiny_config(family), length=2048, **options(method, rotary_pairs(tiny_config(family))))
    layer_type = "full_attention" if family == "gemma3_text" else None
    (tmp_path / "config.json").write_text(json.dumps(old_names_only(rope.portable(config))))
    fresh = AutoConfig.from_pretrained(tmp_path)
    got, scale = rope.frequencies(fresh, layer_type)
    wanted, wanted_scale = rope.frequencies(config, layer_type)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert scale == wanted_scale
    computed_now, _ = computed(tiny_model_from(fresh), layer_type)
    np.testing.assert_allclose(computed_now, wanted, rtol=2e-6)


def test_extension_changes_logits_only_through_positions(tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "source", "llama")
    rope.write_extended(source, tmp_path / "out", factor=2, method="yarn")
    first = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = tiny_model("llama")(first).logits
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(first).logits
    assert torch.allclose(before[:, 0], after[:, 0], atol=1e-5)  # the first token attends to itself alone
    assert not torch.allclose(before[:, 3], after[:, 3], atol=1e-5)


def test_nothing_written_when_the_linter_objects(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    raw = json.loads((source / "config.json").read_text())
    raw["rope_parameters"].pop("rope_theta")
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="rope_theta"):
        rope.write_extended(source, tmp_path / "out", factor=2, method="yarn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("family", ["llama", "stablelm", "gemma3_text", "phi3"])
def test_longrope_takes_its_short_factors_to_the_original_length_and_its_long_ones_beyond(tmp_path, family) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    layer_type = "full_attention" if family == "gemma3_text" else None
    before = tiny_config(family)
    pairs = rotary_pairs(before)
    short, long = tuple(1.0 + 0.1 * i for i in range(pairs)), tuple(2.0 + i for i in range(pairs))
    settings = RopeSettings(short_factor=short, long_factor=long, attention_factor=1.25)
    source = save_tiny(tmp_path / "source", family)
    done = rope.write_extended(source, tmp_path / "out", length=2048, method="longrope", settings=settings)
    assert any("each length is measured" in note for note in done.notes)
    own = math.sqrt(1 + math.log(4) / math.log(512))  # the weights hold what differs
    assert done.query_scale == pytest.approx((1.25 / own) ** 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theta = next(v for v in views(as_dict(before)) if v.layer_type == layer_type).parameters["rope_theta"]
    for last, lists in ((511, short), (512, long)):
        extra = {} if layer_type is None else {"layer_type": layer_type}
        rotary(model)(torch.zeros(1, 1, 16), torch.tensor([[0, last]]), **extra)
        got, scale = computed(model, layer_type)
        np.testing.assert_allclose(got, plain(theta, 2 * pairs) / np.array(lists), rtol=2e-6)
        assert scale == pytest.approx(own)
        ours, ours_scale = rope.frequencies(model.config, layer_type, tokens=last + 1)
        np.testing.assert_allclose(got, ours, rtol=2e-6)
        assert ours_scale == pytest.approx(own)
    assert varying(model.config)


def test_the_length_alone_leaves_every_other_byte(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    done = rope.write_extended(source, tmp_path / "out", length=1024, method="none")
    assert "encoding stays" in done.notes[-1]
    assert done.original == 512
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["max_position_embeddings"] == 1024
    assert "original_max_position_embeddings" not in raw
    assert "rope_scaling" not in raw
    assert raw["rope_theta"] == 1e4
    scaled = rope.extend(tiny_config("llama"), factor=2, method="yarn")
    with pytest.raises(UserError, match="already extended by `yarn`"):
        rope.plan(scaled, factor=2, method="none")
