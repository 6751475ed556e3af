"""torchao's weights of 8 bits and `torch.export` on a folder of ours, past the window that it was extended from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

TOKENS = 700  # of 512 before the extension


@pytest.fixture
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


IDS = torch.arange(TOKENS)[None] * 7 % 256


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1)


def test_torchao_int8(model: Any, folder: Path, tmp_path: Path) -> None:
    """Loaded through transformers' own configuration for it, near the original, and it generates."""
    torchao = pytest.importorskip("torchao", reason="torchao is not installed (extra `downstream`)")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    settings = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    with torch.no_grad():
        before, after = logprobs(model(IDS).logits), logprobs(small(IDS).logits)
    assert not torch.equal(before, after)
    assert (before - after).abs().mean() < 0.05
    assert small.generate(IDS[:, :20], max_new_tokens=4, do_sample=False).shape[1] > 20


def test_torch_export(model: Any) -> None:
    """The graph that `torch.export` takes computes the same logits."""
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
        before, after = model(IDS, use_cache=False).logits, program.module()(IDS, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
