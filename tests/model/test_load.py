"""Devices, dtypes and tokenizers as people name them."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from retrofit.errors import UserError
from retrofit.model.load import load_model, load_tokenizer, quiet, resolve_device, resolve_dtype, stored_dtype
from tests.tiny import FAMILIES, save_tiny, tiny_model


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (resolve_device("auto"), resolve_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(UserError, match="no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("cpu"), resolve_device("cuda")) == ("cuda", "cpu", "cuda")


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
