"""A RoPE base for each layer (granite_swa): extending full-attention layers, and leaving those with a window alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retrofit.context import rope
from retrofit.context.fields import as_dict, views
from retrofit.context.frequencies import base_frequencies, ntk_theta
from retrofit.context.search.encoded import encoded
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.recipe.schema import RopeSettings
from tests.tiny import ONE_ENCODING, save_tiny, tiny_config, tiny_model

FULL, SLIDING = 50_000.0, 1000.0  # of the tiny model
IDS = torch.randint(5, 60, (1, 48), generator=torch.Generator().manual_seed(2))


def rotaries(model: Any) -> dict[float, Any]:
    return {one.config.rope_parameters["rope_theta"]: one for one in model.get_decoder().rotary_embs}


def test_each_kind_of_layer_is_a_view_and_each_layer_has_its_base() -> None:
    config = tiny_config("granite_swa")
    assert [(view.layer_type, view.parameters["rope_theta"]) for view in views(as_dict(config))] == [
        ("full_attention", FULL),
        ("sliding_attention", SLIDING),
    ]
    rotary = [layer.rope for layer in describe(config).layers]
    assert [one and one.theta for one in rotary] == [FULL, SLIDING]
    assert [one and one.parameters["rope_theta"] for one in rotary] == [FULL, SLIDING]
    one = views(as_dict(tiny_config("granite_swa", **ONE_ENCODING["granite_swa"])))
    assert [(view.layer_type, view.parameters["rope_theta"]) for view in one] == [(None, 1e4)]
    without = tiny_config("granite_swa", layer_rope_theta=[0, 1000.0])
    assert [view.layer_type for view in views(as_dict(without))] == ["sliding_attention"]
    assert [layer.rope is None for layer in describe(without).layers] == [True, False]


def test_ntk_raises_the_base_of_full_layers_only() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    config = tiny_config(
        "granite_swa", num_hidden_layers=4, layer_types=kinds, layer_rope_theta=[FULL, SLIDING, 0, FULL]
    )
    after = rope.extend(config, factor=4, method="ntk")
    larger = ntk_theta(FULL, 16, 4)
    assert after.layer_rope_theta == [larger, SLIDING, 0, larger]
    assert after.rope_parameters["rope_theta"] == larger
    assert config.layer_rope_theta == [FULL, SLIDING, 0, FULL]
    again = rope.extend(after, factor=2, method="ntk")
    assert again.layer_rope_theta == pytest.approx([ntk_theta(FULL, 16, 8), SLIDING, 0, ntk_theta(FULL, 16, 8)])


def test_layers_that_share_a_base_part_when_full_ones_are_extended() -> None:
    config = tiny_config("granite_swa", layer_rope_theta=[1e4, 1e4])
    assert rope.extend(config, factor=4, method="ntk").layer_rope_theta == [ntk_theta(1e4, 16, 4), 1e4]


def test_a_written_folder_is_read_by_the_stock_class_and_is_clean(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "granite_swa")
    done = rope.write_extended(source, tmp_path / "out", factor=4, method="ntk")
    assert any("Sliding-window layers keep" in note for note in done.notes)
    assert rope.lint_folder(tmp_path / "out") == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    found = rotaries(model)
    assert set(found) == {SLIDING, ntk_theta(FULL, 16, 4)}
    for theta, module in found.items():
        np.testing.assert_allclose(module.inv_freq.double().numpy(), base_frequencies(theta, 16), rtol=2e-6)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert rope.portable(model.config)["layer_rope_theta"] == stored["layer_rope_theta"]


def test_a_file_without_the_list_has_the_base_of_all(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "granite_swa", layer_rope_theta=[1e4, 1e4])
    raw = json.loads((source / "config.json").read_text())
    del raw["layer_rope_theta"]
    (source / "config.json").write_text(json.dumps(raw))
    rope.write_extended(source, tmp_path / "out", factor=4, method="ntk")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["layer_rope_theta"] == [ntk_theta(1e4, 16, 4), 1e4]


@pytest.mark.parametrize("method", ["yarn", "linear", "llama3"])
def test_a_scaling_that_windowed_layers_would_share_is_refused(method: str) -> None:
    with pytest.raises(UserError, match="sliding-window layers too") as error:
        rope.extend(tiny_config("granite_swa"), factor=4, method=method)
    assert "ntk" in str(error.value.fix)


def test_full_layers_with_several_bases_are_refused() -> None:
    config = tiny_config("granite_swa", layer_types=["full_attention"] * 2)
    with pytest.raises(UserError, match="2 different RoPE bases"):
        rope.extend(config, factor=4, method="ntk")


def test_the_search_measures_what_is_written(tmp_path: Path) -> None:
    """With an attention factor, which full layers alone have."""
    source = save_tiny(tmp_path / "source", "granite_swa")
    settings = RopeSettings(attention_factor=1.31)
    written = rope.write_extended(source, tmp_path / "out", factor=4, method="ntk", settings=settings)
    model = tiny_model("granite_swa")
    with torch.inference_mode():
        before = model(IDS).logits
        with encoded(model, AutoConfig.from_pretrained(tmp_path / "out"), written.query_scale):
            searched = model(IDS).logits
        after = model(IDS).logits
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")(IDS).logits
    torch.testing.assert_close(searched, stock, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (searched - before).abs().max() > 1e-3
