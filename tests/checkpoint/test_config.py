"""Configurations as people have them: read right, or refused in one line before anything is built."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from retrofit.checkpoint.config import RUN_FIELDS, read_config
from retrofit.checkpoint.write import write_config
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.model.inspect import inspect
from retrofit.model.load import load_config, load_model
from tests.tiny import VOCAB_SIZE, save_tiny, tiny_config

BIG = 10**9
# (family, fields of config.json, words of the message)
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    *(("llama", {name: value}, name) for value in (0, -1, 3.5, "64", [64]) for name in ("hidden_size", "vocab_size")),
    *(("llama", {"num_hidden_layers": value}, "num_hidden_layers") for value in (0, -1, 10**6, BIG, 10**30, None)),
    *(("llama", {name: BIG}, name) for name in ("num_attention_heads", "head_dim", "intermediate_size", "num_labels")),
    ("llama", {"max_position_embeddings": 10**30}, "max_position_embeddings"),
    ("mixtral", {"num_local_experts": BIG}, "num_local_experts"),
    ("mixtral", {"num_experts_per_tok": 9}, "cannot pass 9 of"),
    ("gpt_bigcode", {"n_layer": BIG}, "n_layer"),
    ("gpt_bigcode", {"add_cross_attention": True}, "attends to an encoder"),
    ("llama", {"num_attention_heads": 3}, "hidden"),
    ("llama", {"num_key_value_heads": 3}, "shared evenly"),
    ("llama", {"num_key_value_heads": 8}, "shared evenly"),
    ("llama", {"head_dim": 15}, "15"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ("llama", {"extra": [{"a": float("inf")}]}, "not finite"),
    ("granite", {"attention_multiplier": float("inf")}, "attention_multiplier"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma2", {"attn_logit_softcapping": -5.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window"),
    ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types"),
    ("gemma3_text", {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    ("llama", {"hidden_act": "__import__"}, "no activation"),
    ("llama", {"hidden_act": None}, "hidden_act"),
    ("llama", {"dtype": "load"}, "no dtype of weights"),
    ("llama", {"torch_dtype": 5}, "no dtype of weights"),
    ("llama", {"model_type": ["llama"]}, "no model_type"),
    ("llama", {"model_type": "zzz"}, "does not know the model type"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "no list of class names"),
    ("llama", {"architectures": ["x\n```\nimport os"]}, "no list of class names"),
    ("llama", {"architectures": [None]}, "no list of class names"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
    ("llama", {"architectures": ["LlamaForRewardModelWithGating"]}, "not a causal language model"),
    ("llama", {"is_encoder_decoder": True}, "has an encoder"),
    ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config|differ|valid"),
    ("llama", {"text_config": {"hidden_size": 5}}, "text_config"),
    ("llama", {"auto_map": ["a"]}, "auto_map"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "code of its own"),
    ("llama", {"quantization_config": [1]}, "quantised"),
    ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ("llama", {"to_dict": 5}, "`to_dict`"),
    ("llama", {"attribute_map": {"hidden_size": "vocab_size"}}, "`attribute_map`"),
    ("llama", {"pad_token_id": 10**6}, "pad_token_id"),
    ("llama", {"bos_token_id": BIG}, "bos_token_id"),
    ("llama", {"eos_token_id": [1, VOCAB_SIZE]}, "eos_token_id"),
    ("llama", {"bos_token_id": "x"}, "bos_token_id"),
    ("llama", {"attention_dropout": "x"}, "attention_dropout"),
)


def stored(folder, family: str, **fields: Any):
    config = {**tiny_config(family).to_dict(), "model_type": family, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_values_of_no_model_are_refused(tmp_path, family, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(stored(tmp_path, family, **fields))
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "null", "", '{"model_type": "llama", "a": 1, "a": 2}', '{"a": "\ud800"}', "\xff", "[" * 100_000),
        '{"model_type": "llama", "x": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"hidden_size": ' + "9" * 5000 + "}",
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1" if text == "\xff" else "utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("config.json")])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = stored(tmp_path, "llama") / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert describe(load_config(tmp_path)).hidden_size == 64


def test_what_says_how_to_run_a_model_reaches_no_load_and_no_file(tmp_path):
    folder = save_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    evil = {**dict.fromkeys(RUN_FIELDS, "kernels-community/evil"), "return_dict": False, "output_attentions": True}
    stored(folder, "llama", **config, **{key: value for key, value in evil.items() if key != "transformers_weights"})
    model = load_model(folder)
    assert model.config._attn_implementation == "sdpa"
    assert model(**model.dummy_inputs).logits.shape[-1] == VOCAB_SIZE
    assert not RUN_FIELDS & write_config(tmp_path, {**config, **evil, "text_config": evil}).keys()
    assert json.loads((tmp_path / "config.json").read_text())["text_config"] == {}


def test_fields_left_to_the_class_are_those_of_the_class(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 4}')
    found = inspect(tmp_path)
    assert (found.query_heads, found.kv_heads, found.head_dim) == (8, 4, 256)
    assert found.max_position_embeddings == 131_072


def test_an_empty_quantisation_is_none(tmp_path):
    folder = save_tiny(tmp_path)
    stored(folder, "llama", quantization_config={}, compression_config=None)
    assert load_model(folder).config.hidden_size == 64


@pytest.mark.parametrize("name", ["transformers.js_config", "onnx_config", "neuron_config"])
def test_settings_of_other_programs_are_in_their_own_words(tmp_path, name):
    load_config(stored(tmp_path, "llama", **{name: {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}}}))


@pytest.mark.parametrize("value", [-1, None, VOCAB_SIZE - 1])
def test_padding_that_torch_takes_is_accepted(tmp_path, value):
    assert load_config(stored(tmp_path, "llama", pad_token_id=value)).pad_token_id == value


def test_defaults_of_a_class_beyond_a_small_vocabulary_are_nobodys_wish(tmp_path):
    config = {"model_type": "gpt_bigcode", "vocab_size": 264, "n_embd": 64, "n_head": 4, "n_layer": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(load_config(tmp_path)).vocab_size == 264
