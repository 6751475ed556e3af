"""The KV cache of fewer bits that is simulated is llama.cpp's own: what it changes is what llama.cpp's changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evals.engines import work
from retrofit.kernels.rounded_cache import round_cache
from retrofit.publishing.engines import environments
from retrofit.publishing.engines.converter import convert
from retrofit.publishing.engines.run import Passage, Request, score
from tests.tiny import save_tiny, tiny_model

SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
IDS = tuple(torch.randint(5, 250, (120,), generator=torch.Generator().manual_seed(4)).tolist())
POSITIONS = tuple(range(60, 119, 4))


def changes(cache_dtype: str) -> np.ndarray:
    """What the simulated cache changes in the log-probabilities, [positions, V]."""
    found = []
    for kind in ("auto", cache_dtype):
        model = tiny_model("llama", **SHAPE)
        round_cache(model, kind)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, list(POSITIONS)]
        found.append(logits.double().log_softmax(-1).numpy())
    return found[1] - found[0]


def test_what_q4_0_changes_is_what_it_changes_in_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model, so that the rounding of one layer is not lost in the next; llama.cpp rounds queries too."""
    monkeypatch.setenv("RETROFIT_CACHE", sys.prefix)
    engine, converter = (environments.find(name) for name in ("llama.cpp", environments.CONVERTER))
    if engine is None or converter is None:
        pytest.skip("no environment of llama.cpp: make test makes it")
    folder, file = save_tiny(tmp_path / "tiny", "llama", **SHAPE), tmp_path / "tiny.gguf"
    convert(folder, file, "f32", environment=converter, name="tiny", program=work.TO_GGUF)
    asked = (Passage(IDS, POSITIONS),)
    plain, stored = score(engine, [Request(file, asked, 512, 200, cache_type=kind) for kind in ("f32", "q4_0")])
    assert plain.error is stored.error is None, (plain.error, stored.error)
    ours, theirs = [], []
    for index, row in enumerate(changes("q4_0")):
        before = dict(zip(plain.rows[0].tokens[index], plain.rows[0].logprobs[index], strict=True))  # type: ignore[index]
        after = dict(zip(stored.rows[0].tokens[index], stored.rows[0].logprobs[index], strict=True))  # type: ignore[index]
        both = sorted(before.keys() & after.keys())
        ours += [row[token] for token in both]
        theirs += [after[token] - before[token] for token in both]
    assert len(ours) > 1000
    assert np.corrcoef(ours, theirs)[0, 1] > 0.95
    assert 0.8 < np.std(ours) / np.std(theirs) < 1.25
