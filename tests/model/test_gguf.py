"""GGUF files against the safetensors model they were written from; and the embedded model itself (slow)."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from retrofit.console import Silent
from retrofit.errors import UserError
from retrofit.install import install_command
from retrofit.model.cache import cache_dir
from retrofit.model.inspect import inspect
from retrofit.model.load import load_config, load_model, load_tokenizer
from retrofit.model.source import EMBEDDED_MODEL, embedded_file, resolve
from tests.tiny import SPECIAL_TOKENS, tiny_model, tiny_tokenizer

writer = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(
    path: Path,
    *,
    kind: str = "F32",
    architecture: str = "llama",
    pre: str = "gpt-2",
    extra: dict[str, object] | None = None,
    metadata: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """tiny_model("llama", num_key_value_heads=2, theta 50000) as GGUF; q and k rows in llama.cpp's pair order."""
    model = source_model()
    config, out = model.config, writer.GGUFWriter(path, architecture)
    for key, value in {"general.name": "tiny", **(metadata or {})}.items():
        (out.add_string if isinstance(value, str) else out.add_uint32)(key, value)
    out.add_license("mit")
    out.add_string("general.base_model.0.repo_url", "https://huggingface.co/org/base")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_rope_dimension_count(config.head_dim)
    out.add_vocab_size(config.vocab_size)
    for key, value in (extra or {}).items():
        (out.add_string if isinstance(value, str) else out.add_float32)(f"{architecture}.{key}", value)
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + ["he", "<u0>", "<u1>"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([3 if token in SPECIAL_TOKENS.values() else 1 for token in tokens])
    out.add_token_merges(["h e"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(257)
    out.add_pad_token_id(258)
    out.add_chat_template("{{ messages[0]['content'] }}")
    names = writer.get_tensor_name_map(writer.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        rows = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
        stem, suffix = name.rsplit(".", 1)
        quantised = getattr(writer.GGMLQuantizationType, kind if rows.ndim > 1 and rows.shape[-1] % 32 == 0 else "F32")
        data = rows if quantised.name == "F32" else writer.quantize(rows, quantised)
        out.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=quantised)
    for name, data in (tensors or {}).items():
        out.add_tensor(name, data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def source_model():
    parameters = {"rope_type": "default", "rope_theta": 50_000.0}
    return tiny_model("llama", num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=parameters)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(60)[None]).logits


def test_float_file_is_the_same_model(tmp_path, cache):
    found = resolve(write_gguf(tmp_path / "m.gguf"))
    assert (found.kind, found.dtype, found.license, found.base_model) == ("gguf", "float32", "mit", "org/base")
    assert found.folder.parent == cache
    torch.testing.assert_close(
        logits(load_model(found.folder, kernel="eager")), logits(source_model()), atol=1e-5, rtol=1e-5
    )
    config = json.loads((found.folder / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 50_000.0, "rope_type": "default"}
    assert (config["head_dim"], config["num_key_value_heads"], config["rms_norm_eps"]) == (16, 2, 1e-5)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 257, 258)
    assert config["tie_word_embeddings"] is False
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    tokenizer = load_tokenizer(found.folder)
    assert tokenizer("the<s>").tokens() == ["t", "he", "<s>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert not list(cache.glob("*.partial"))


def test_quantised_file_becomes_bfloat16(tmp_path):
    found = resolve(write_gguf(tmp_path / "m.gguf", kind="Q8_0"))
    assert found.dtype == "bfloat16"
    difference = (logits(load_model(found.folder, dtype="float32")) - logits(source_model())).abs()
    assert 0 < difference.max() < 0.3


def test_a_quantised_file_is_named_and_a_float_one_has_nothing_to_say(tmp_path):
    (note,) = resolve(write_gguf(tmp_path / "q.gguf", kind="Q8_0"), weights=False).notes
    assert "q.gguf, quantised (most of them as Q8_0), and kept as bfloat16" in note
    assert resolve(write_gguf(tmp_path / "f.gguf"), weights=False).notes == ()


def test_conversion_is_done_once(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    light = resolve(path, weights=False, progress=(told := Silent()))
    assert not list(light.folder.glob("*.safetensors"))
    assert told.notes == [f"configuration and tokenizer of m.gguf are kept in {light.folder}"]
    assert load_config(light.folder).num_key_value_heads == 2
    assert inspect(light).parameters == sum(p.numel() for p in source_model().parameters())
    first = resolve(path)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    path.rename(tmp_path / "renamed.gguf")
    again = resolve(tmp_path / "renamed.gguf")
    assert again.folder == first.folder != light.folder
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == written
    assert resolve(tmp_path / "renamed.gguf", weights=False).folder == first.folder


def test_the_file_alone_decides_whatever_lies_beside_it(tmp_path, cache):
    (tmp_path / "beside").mkdir()
    path = write_gguf(tmp_path / "beside" / "m.gguf")
    other = tiny_model("llama", num_key_value_heads=4)
    other.config.save_pretrained(path.parent)
    tiny_tokenizer().save_pretrained(path.parent)
    (path.parent / "tokenizer_config.json").write_text('{"bos_token": "<pad>", "chat_template": "other"}')
    (path.parent / "chat_template.jinja").write_text("other")
    (path.parent / "adapter_config.json").write_text('{"base_model_name_or_path": "."}')
    (path.parent / "generation_config.json").write_text('{"eos_token_id": 1}')
    beside = resolve(path)
    written = {file.name: file.read_bytes() for file in beside.folder.iterdir()}
    shutil.rmtree(cache)
    (tmp_path / "alone").mkdir()
    path.rename(tmp_path / "alone" / "m.gguf")
    alone = resolve(tmp_path / "alone" / "m.gguf")
    assert {file.name: file.read_bytes() for file in alone.folder.iterdir()} == written


@pytest.mark.parametrize("name", ["UP.GGUF", "model.bin", "no-suffix", "м [1] `x`.gguf"])
def test_a_gguf_is_one_whatever_it_is_called(name, tmp_path):
    path = write_gguf(tmp_path / "m.gguf").rename(tmp_path / name)
    assert resolve(path, weights=False).kind == "gguf"


def test_a_folder_that_holds_one_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert resolve(tmp_path, weights=False).folder == resolve(path, weights=False).folder
    path.rename(tmp_path / "a.gguf")
    (tmp_path / "b.GGUF").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"2 GGUF files \(a.gguf, b.GGUF\)"):
        resolve(tmp_path, weights=False)
    source_model().save_pretrained(tmp_path)
    assert resolve(tmp_path).kind == "folder"


def test_cached_weights_that_were_changed_are_made_again(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    weights = resolve(path).folder / "model.safetensors"
    written = weights.read_bytes()
    weights.write_bytes(written[:-4] + b"1234")
    resolve(path, progress=(progress := Silent()))
    assert weights.read_bytes() == written
    assert "model.safetensors was changed): it is made again" in progress.notes[0]


def test_a_llama_file_named_mistral_has_no_window(tmp_path):
    found = resolve(write_gguf(tmp_path / "m.gguf", metadata={"general.name": "mistral"}), weights=False)
    assert load_config(found.folder).sliding_window is None


def test_digits_are_split_as_the_file_says(tmp_path):
    together = load_tokenizer(resolve(write_gguf(tmp_path / "a.gguf", pre="gpt-2")).folder)
    alone = load_tokenizer(resolve(write_gguf(tmp_path / "b.gguf", pre="smollm")).folder)
    split = [tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12") for tokenizer in (together, alone)]
    assert [piece for piece, _ in split[0]] == ["a", "Ġ", "Ġ12"]
    assert [piece for piece, _ in split[1]] == ["a", "ĠĠ", "1", "2"]


def test_refused(tmp_path, cache, monkeypatch):
    def refused(path: Path, match: str) -> UserError:
        with pytest.raises(UserError, match=match) as caught:
            resolve(path)
        return caught.value

    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:-1000])
    refused(tmp_path / "short.gguf", "truncated or damaged")
    (tmp_path / "header.gguf").write_bytes(whole[:100])
    refused(tmp_path / "header.gguf", "truncated or damaged")
    (tmp_path / "not.gguf").write_bytes(b"\x80\x04pickle")
    refused(tmp_path / "not.gguf", "not a GGUF file")
    assert "llama" in refused(write_gguf(tmp_path / "mpt.gguf", architecture="mpt"), "architecture `mpt`").fix
    scaled = write_gguf(tmp_path / "yarn.gguf", extra={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
    refused(scaled, r"does not take over RoPE scaling \(yarn\)")
    factors = write_gguf(tmp_path / "l3.gguf", tensors={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    refused(factors, "does not take over RoPE scaling")
    refused(
        write_gguf(tmp_path / "scale.gguf", extra={"attention.scale": 0.5}), r"attention.scale = 0.5 \(it reads 0.25"
    )
    refused(write_gguf(tmp_path / "pre.gguf", pre="poro-chat"), "splits text .*poro-chat")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "new.gguf").write_bytes(whole + b"\0")
    assert refused(tmp_path / "new.gguf", "package `gguf`").fix == install_command(extra="gguf")
    assert not cache.exists() or not [path for path in cache.iterdir() if not path.name.startswith(".")]


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write there"):
        resolve(path)
    monkeypatch.delenv("RETROFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "retrofit"


@pytest.mark.slow
def test_embedded_model_predicts_english(tmp_path):
    try:
        embedded_file()
    except UserError:
        pytest.skip("the demo extra is not installed")
    found = resolve("embedded")
    assert (found.dtype, found.license, found.base_model) == ("bfloat16", "apache-2.0", EMBEDDED_MODEL)
    config = load_config(found.folder)
    assert config.rope_parameters == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (1, 2, True)
    assert config.max_position_embeddings == 8192
    tokenizer, model = load_tokenizer(found.folder), load_model(found.folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer("x =  12").tokens() == ["x", "Ġ=", "ĠĠ", "1", "2"]
    text = "".join(pydoc_data.topics.topics[topic] for topic in ("exceptions", "naming"))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    with torch.no_grad():
        perplexity = torch.exp(model(ids, labels=ids).loss)
    assert perplexity < 40


def test_a_machine_without_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")

    def small(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", small)
    with pytest.raises(UserError, match="not enough memory"):
        resolve(tmp_path / "m.gguf")
