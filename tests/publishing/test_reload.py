"""A fresh process without this package reproduces what was recorded, and notices when it does not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.score import score
from retrofit.model.load import load_model
from retrofit.publishing.reload import (
    CHILD,
    START_SECONDS,
    TOLERANCES,
    ReloadReport,
    _compare,
    limits_of,
    reload_and_score,
)
from retrofit.publishing.snippet import load_snippet
from tests.tiny import save_tiny, tiny_model

TOKENS = 40
SNIPPET = load_snippet(chat=False)


def reference_losses(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[next], the formula over one whole forward pass."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1].double()
    return -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])].float().numpy()


def prepare(tmp_path: Path, family: str, *, chat: bool = False) -> tuple[Path, list[Document], TokenLosses]:
    folder = save_tiny(tmp_path / "final", family, chat_template=chat)
    rng = np.random.default_rng(0)
    documents = [Document(name=f"text {i}", kind="k", input_ids=rng.integers(0, 256, 60), nbytes=60) for i in range(2)]
    losses = tuple(reference_losses(tiny_model(family), document.input_ids) for document in documents)
    recorded = TokenLosses(
        documents=tuple(d.name for d in documents),
        kinds=("k", "k"),
        losses=losses,
        nbytes=(60, 60),
        token_bytes=tuple(np.zeros(59, np.int32) for _ in documents),
        token_ids=tuple(document.input_ids[1:].astype(np.int32) for document in documents),
        meta={"dtype": "float32"},
    )
    return folder, documents, recorded


def test_a_fresh_process_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding layers, a chat template and chunks that cut the window: against the formula over one whole pass."""
    monkeypatch.setattr("retrofit.publishing.reload.CHUNK", 16)
    folder, documents, recorded = prepare(tmp_path, "gemma3_text", chat=True)
    report = reload_and_score(folder, documents, recorded, tokens=TOKENS, snippet=load_snippet(chat=True))
    assert report.passed
    assert report.problems == ()
    assert report.max_difference < 1e-4
    assert report.documents == 2
    assert report.tokens == 2 * TOKENS
    assert report.new_tokens >= 1
    assert report.dtype == "float32"
    assert report.versions.keys() == {"python", "torch", "transformers"}


@pytest.mark.slow
def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    folder, documents, recorded = prepare(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    lost = {name: t for name, t in weights.items() if name != "model.layers.1.self_attn.k_proj.weight"}
    save_file({**lost, "model.extra": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not reproduce") as caught:
        reload_and_score(folder, documents, recorded, tokens=TOKENS, snippet=SNIPPET)
    assert "missing keys: model.layers.1.self_attn.k_proj.weight" in str(caught.value)
    assert "unexpected keys: model.extra" in str(caught.value)


def test_the_card_is_never_read_for_what_to_run(tmp_path: Path) -> None:
    """A card with other lines changes nothing; the snippet that is given runs, and without this package."""
    folder, documents, recorded = prepare(tmp_path, "llama")
    trace = tmp_path / "trace"
    (folder / "README.md").write_text(f"```python\nmodel_id = '.'\nopen({str(trace)!r}, 'w')\n```\n")
    assert reload_and_score(folder, documents, recorded, tokens=TOKENS, snippet=SNIPPET).passed
    assert not trace.exists()
    snippet = SNIPPET.replace("output = model", "import retrofit\noutput = model")
    with pytest.raises(UserError, match="cannot load and run") as caught:
        reload_and_score(folder, documents, recorded, tokens=TOKENS, snippet=snippet)
    assert "retrofit is blocked in this process" in str(caught.value)


FOUND = {
    "loading": {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []},
    "architecture": "LlamaForCausalLM",
    "stock": True,
    "generated": "x",
    "new_tokens": 3,
    "seconds": 1.0,
    "versions": {},
}


LOSSES = tuple(np.random.default_rng(i).random(50).astype(np.float32) + 1 for i in range(2))


def compared(fresh: list[np.ndarray], dtype: str, **change: object) -> ReloadReport:
    return _compare(("a", "b"), fresh, LOSSES, dtype, {**FOUND, **change})


@pytest.mark.parametrize("dtype", sorted(TOLERANCES))
def test_differences_beyond_the_tolerance_of_the_dtype(dtype: str) -> None:
    same = [losses[:20].copy() for losses in LOSSES]
    assert compared(same, dtype).passed

    allowed = TOLERANCES[dtype].mean_of(20)
    assert TOLERANCES[dtype].mean == TOLERANCES[dtype].mean_of(2048) < allowed < 0.5 * TOLERANCES[dtype].token
    assert compared([same[0], same[1] + 0.9 * allowed], dtype).passed
    shifted = [same[0], same[1] + 1.5 * allowed]  # every token a little: only the mean tells
    report = compared(shifted, dtype)
    assert not report.passed
    assert report.worst == "b"
    assert len(report.problems) == 1
    assert report.problems[0].startswith("b: mean loss")

    spiked = [same[0].copy(), same[1]]
    spiked[0][7] += 2 * TOLERANCES[dtype].token
    report = compared(spiked, dtype)
    assert not report.passed
    assert "token 8" in report.problems[0]
    assert report.max_difference == pytest.approx(2 * TOLERANCES[dtype].token, rel=1e-3)


def test_other_findings_fail() -> None:
    same = [losses[:20] for losses in LOSSES]
    assert not compared([same[0], same[1] * np.nan], "bfloat16").passed
    for change in ({"stock": False}, {"new_tokens": 0}, {"loading": {"mismatched_keys": ["x"]}}):
        assert not compared(same, "float32", **change).passed


@pytest.mark.slow
def test_an_encoding_that_changes_with_the_length_is_compared_at_a_recorded_short_length(tmp_path: Path) -> None:
    """And only as far as was recorded: documents may be longer than what was scored of them."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    }
    shape = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    folder = save_tiny(tmp_path / "final", "phi3", **shape)
    rng = np.random.default_rng(0)
    documents = [Document(name=f"text {i}", kind="k", input_ids=rng.integers(0, 256, 60), nbytes=60) for i in range(2)]
    model = load_model(folder)
    recorded = score(model, [document.cut(48) for document in documents], lengths=[24, 48])
    assert np.abs(recorded.losses[0][:23] - recorded.by_length[24][0]).max() > 0.01, "the lengths must differ"
    report = reload_and_score(folder, documents, recorded, tokens=TOKENS, snippet=SNIPPET)
    assert report.passed
    assert report.tokens == 2 * 24
    with pytest.raises(UserError, match="change beyond 32 tokens") as caught:
        reload_and_score(folder, documents, score(model, documents, lengths=[40, 48]), tokens=TOKENS, snippet=SNIPPET)
    assert "at most 32" in str(caught.value.fix)


@pytest.mark.slow
def test_a_document_is_compared_as_far_as_it_was_scored(tmp_path: Path) -> None:
    folder, documents, recorded = prepare(tmp_path, "llama")
    short = tuple(losses[:20] for losses in recorded.losses)
    zeros = tuple(np.zeros(20, np.int32) for _ in short)
    recorded = replace(recorded, losses=short, token_bytes=zeros, token_ids=zeros)
    report = reload_and_score(folder, documents, recorded, tokens=TOKENS, snippet=SNIPPET)
    assert report.passed
    assert report.tokens == 2 * 21


def test_unknown_dtype_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tolerance"):
        reload_and_score(tmp_path, [], TokenLosses((), (), (), (), (), ()), snippet=SNIPPET, dtype="int4")


def test_the_child_refuses_a_process_that_holds_retrofit() -> None:
    code = f"import runpy, retrofit\nrunpy.run_path({str(CHILD)!r})['main']({{}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "retrofit can be imported here" in done.stderr


def test_limits_grow_with_the_work(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    few, many = limits_of(tmp_path, 10), limits_of(tmp_path, 10_000)
    assert few.seconds > START_SECONDS
    assert many.seconds > few.seconds
    assert many.memory > few.memory
