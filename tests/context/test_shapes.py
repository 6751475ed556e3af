"""Rotary fields as they stand in people's files: what is read is what transformers computes, or both refuse."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retrofit.context.frequencies import frequencies, of_layer
from retrofit.context.lint import lint
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.model.load import load_config, quiet
from tests.tiny import tiny_config

GONE = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings", "head_dim")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
BARE = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
SLIDES = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}

# (family, fields of config.json in the place of its rotary ones)
READ: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"rope_scaling": None}),
    ("llama", {"max_position_embeddings": None, "max_sequence_length": 512}),
    ("llama", {"rope_theta": 1000000.0}),
    ("llama", {"rope_theta": 500000}),
    ("llama", {"rope_theta": 1e4, "head_dim": 24}),
    ("llama", {"rope_theta": 1e4, "num_key_value_heads": None}),
    ("llama", {"rope_theta": 1e4, "partial_rotary_factor": 1.0}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "default"}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"factor": 2.0}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": YARN}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "type": "linear"}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "factor": 4, "finetuned": True}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "factor": 0.5}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "factor": None}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "attention_factor": 1.5}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "mscale": 0.7, "truncate": False}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**YARN, "beta_fast": 2, "beta_slow": 2}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": BARE}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": BARE, "original_max_position_embeddings": 128}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": YARN, "original_max_position_embeddings": 32}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": LLAMA3, "original_max_position_embeddings": 128}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 256}}),
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": LOCAL}),
    ("llama", {"rope_scaling": {**LISTS, "rope_type": "longrope", "original_max_position_embeddings": 128}}),
    ("llama", {"rope_parameters": {"rope_type": "default"}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"rope_type": "proportional"}}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": {**YARN, "original_max_position_embeddings": 512}}),
    ("qwen2", {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 512, "max_window_layers": 28}),
    ("qwen2", {"rope_theta": 1e6, **SLIDES}),
    ("qwen3", {"rope_theta": 1e6, "head_dim": 16, "max_position_embeddings": 640, "rope_scaling": YARN}),
    ("mistral", {"rope_theta": 1e4, "sliding_window": 64}),
    ("mistral", {"rope_theta": 1e6, "sliding_window": None, "head_dim": 24}),
    ("stablelm", {"rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    ("stablelm", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("phi", {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": YARN}),
    ("phi", {"rope_parameters": {**LOCAL, "partial_rotary_factor": 0.25}}),
    (
        "phi3",
        {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **LISTS}, "original_max_position_embeddings": 128},
    ),
    ("phi3", {"rope_parameters": {**LOCAL, **LISTS, "rope_type": "longrope", "original_max_position_embeddings": 128}}),
    ("gemma2", {"rope_theta": 2e4, "head_dim": 16}),
    ("gemma3_text", {"head_dim": 16}),
    ("gemma3_text", {"head_dim": 16, "rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": None}),
    ("gemma3_text", {"head_dim": 16, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gemma3_text", {"head_dim": 16, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 8.0}}),
    ("gemma3_text", {"head_dim": 16, "rope_parameters": {"full_attention": {**YARN, "rope_theta": 1e6}}}),
    (
        "gemma3_text",
        {
            "head_dim": 16,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}},
        },
    ),
    ("mixtral", {"rope_theta": 1e6}),
    ("qwen3_moe", {"rope_theta": 1e6, "head_dim": 16, "rope_scaling": YARN}),
    ("cohere", {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("smollm3", {"rope_theta": 5e6}),
)
REFUSED_BY_BOTH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"rope_theta": "500000"}),
    ("llama", {"rope_theta": 1e4, "max_position_embeddings": 512.0}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": [1]}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": "linear"}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"rope_type": None, "factor": 2.0}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "ntk", "factor": 2.0}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": "2"}}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}),
    ("llama", {"rope_theta": 1e4, "torch_dtype": "auto", "dtype": None}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}),
    ("qwen2", {"rope_parameters": {"full_attention": LOCAL}}),
    ("phi", {"rope_theta": 1e4, "partial_rotary_factor": None}),
    ("mixtral", {"rope_theta": 1e6, "rope_scaling": YARN}),
    ("mistral", {"rope_theta": 1e4, "layer_types": ["full_attention", "sliding_attention"]}),
)
# transformers computes something from these without a word that nobody can have meant.
REFUSED_BY_US: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("llama", {"rope_theta": 0}, "rope_theta"),
    ("llama", {"rope_theta": -1.0}, "rope_theta"),
    ("llama", {"rope_theta": float("nan")}, "not finite"),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    ("llama", {"rope_parameters": {"full_attention": LOCAL}}, "one set of rotary parameters"),
    ("llama", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "whole heads"),
    ("gemma3_text", {"head_dim": 16, "rope_parameters": LOCAL}, "each kind of layer"),
    ("phi", {"rope_theta": 1e4, "partial_rotary_factor": 0.0}, "above 0 to 1"),
)


@cache
def _plain(family: str) -> str:
    config = tiny_config(family).to_dict()
    return json.dumps({key: value for key, value in config.items() if key not in GONE})


def stored(folder, family: str, fields: dict[str, Any]):
    """A folder with the config.json of a tiny model and these fields; those given as None are left out but for two."""
    config = {**json.loads(_plain(family)), "model_type": family, **fields}
    if config.get("max_position_embeddings") is None:
        config.pop("max_position_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def computed(folder) -> dict[str | None, tuple[np.ndarray, float]]:
    """{kind of layer: (inverse frequencies, attention factor)} that transformers' own class holds."""
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model(torch.arange(1, 5)[None])
    rotary, found = model.model.rotary_emb, {}
    for name, buffer in rotary.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            kind = name.removesuffix("inv_freq")
            found[kind.rstrip("_") or None] = (buffer.double().numpy(), getattr(rotary, f"{kind}attention_scaling"))
    return found


@pytest.mark.parametrize(("family", "fields"), READ)
def test_what_is_read_is_what_transformers_computes(tmp_path, family, fields):
    folder = stored(tmp_path, family, fields)
    config, wanted = load_config(folder), computed(folder)
    for kind, (spectrum, scale) in wanted.items():
        found, factor = frequencies(config, kind)
        np.testing.assert_allclose(found, spectrum, rtol=2e-6)
        assert factor == pytest.approx(scale)
    for layer in describe(config).layers:
        if layer.rope is not None:
            kind = None if None in wanted else config.layer_types[layer.index]
            np.testing.assert_allclose(of_layer(config, layer.rope), wanted[kind][0], rtol=2e-6)
            assert layer.rope.rotary_dim == 2 * len(wanted[kind][0])


@pytest.mark.parametrize(("family", "fields"), REFUSED_BY_BOTH)
def test_what_transformers_refuses_is_refused(tmp_path, family, fields):
    folder = stored(tmp_path, family, fields)
    with pytest.raises(Exception):  # noqa: B017 - of every kind: that is what is turned into one
        computed(folder)
    with pytest.raises(UserError):
        describe(load_config(folder))


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED_BY_US)
def test_what_nobody_can_have_meant_is_refused(tmp_path, family, fields, message):
    with pytest.raises(UserError, match=message):
        load_config(stored(tmp_path, family, fields))


@pytest.mark.parametrize("value", [[1], {"a": 1}, "x", True, 0, -1, 10**400, 1e308, float("nan")])
@pytest.mark.parametrize("key", ["rope_theta", "factor", "beta_fast", "mscale", "original_max_position_embeddings"])
def test_the_linter_names_what_is_no_number(key, value):
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    raw = {**text, "rope_parameters": {**YARN, "rope_theta": 1e4, key: value}}
    lint(raw)
    with pytest.raises(UserError):
        frequencies(raw)


@pytest.mark.parametrize("value", [5, "linear", [1], {"full_attention": 1}])
def test_the_linter_names_what_is_no_set_of_parameters(value):
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    assert "not-an-object" in [one.rule for one in lint({**text, "rope_parameters": value})]


def test_two_original_lengths_are_an_error():
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    found = lint({**text, "rope_parameters": {**YARN, "rope_theta": 1e4}, "original_max_position_embeddings": 64})
    assert "original-conflict" in [one.rule for one in found]
