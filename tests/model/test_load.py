"""Devices, dtypes and tokenizers as people name them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.utils import logging

from retrofit.errors import UserError
from retrofit.model.load import (
    load_config,
    load_model,
    load_tokenizer,
    multiplies_in_bfloat16,
    product_dtype,
    quiet,
    resolve_device,
    resolve_dtype,
    stored_dtype,
    working_dtype,
)
from tests.tiny import FAMILIES, save_tiny, tiny_model


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (resolve_device("auto"), resolve_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(UserError, match="no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("cpu"), resolve_device("cuda")) == ("cuda", "cpu", "cuda")


def test_auto_is_the_gpu_of_a_mac_where_there_is_one(monkeypatch):
    with pytest.raises(UserError, match="no MPS device"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("mps")) == ("mps", "mps")
    for newer in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version, newer=newer: newer)
        assert multiplies_in_bfloat16("mps") == newer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_dtype_is_the_stored_one(tmp_path, dtype):
    folder = save_tiny(tmp_path, dtype=dtype, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert stored_dtype(folder) == dtype
    assert resolve_dtype("auto", folder) == getattr(torch, dtype)
    assert resolve_dtype("float32", folder) == torch.float32
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert stored_dtype(folder) == dtype, "without weights, from config.json"
    with pytest.raises(UserError, match="`int4` is not a dtype"):
        resolve_dtype("int4", folder)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "amx_tile", "sve_bf16", "bf16"])
def test_bfloat16_products_are_known_by_any_of_their_capabilities(name, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx2": True, name: has})
        assert multiplies_in_bfloat16("cpu") == has


def test_bfloat16_products_of_a_gpu_are_what_torch_says(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert multiplies_in_bfloat16("cuda:0") == has


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bfloat16_products_with_a_torch_that_lists_no_capabilities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for one in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, one, lambda has=one == name: has, raising=False)
    assert multiplies_in_bfloat16("cpu")
    monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not multiplies_in_bfloat16("cpu")
    monkeypatch.delattr(torch.cpu, name)
    assert not multiplies_in_bfloat16("cpu")


def test_products_are_in_bfloat16_where_the_processor_has_them(bfloat16_products):
    assert multiplies_in_bfloat16("cpu") == bfloat16_products
    assert product_dtype("cpu") == (torch.bfloat16 if bfloat16_products else None)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_model_runs_in_its_own_dtype_or_in_what_the_processor_multiplies(stored, bfloat16_products, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": stored}))
    own = stored == "bfloat16" and bfloat16_products
    assert working_dtype("auto", tmp_path, "cpu") == (stored if own else "float32")
    assert working_dtype("auto", tmp_path, "cuda") == "auto"
    assert working_dtype("float16", tmp_path, "cpu") == "float16", "what is asked for is not changed"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_from_its_folder(tmp_path, family):
    loaded = load_model(save_tiny(tmp_path, family))
    expected = tiny_model(family).state_dict()
    assert not loaded.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_missing_tokenizer(tmp_path):
    folder = save_tiny(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(folder)


def test_quiet_restores_what_was_set():
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    with pytest.raises(RuntimeError), quiet():
        assert not logging.is_progress_bar_enabled()
        raise RuntimeError
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == verbosity
    if not bar:
        logging.disable_progress_bar()


@pytest.mark.parametrize("name", ["to_dict", "attribute_map", "sub_configs", "default_theta"])
def test_no_field_stands_for_a_part_of_the_class(name, tmp_path):
    config = json.loads((save_tiny(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: {}}))
    with pytest.raises(UserError, match=f"a field `{name}`, which no configuration has"):
        load_config(tmp_path)


def test_how_a_model_is_spread_over_devices_is_not_read_from_it(tmp_path):
    config = json.loads((save_tiny(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_model_tp_plan": 5}))
    assert load_config(tmp_path).base_model_tp_plan != 5
