"""Re-expression as people meet it: `--reexpress-only`, and before a conversion that needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import retrofit
from retrofit.checkpoint import staging
from retrofit.checkpoint.provenance import read_provenance
from retrofit.errors import UserError
from retrofit.model import reexpress
from retrofit.workflow import step
from tests.model.reexpressed import FIRST, ids, load, save


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    fields = next(fields for name, _, fields in FIRST if name == "gpt2")
    return save(tmp_path / "source", "gpt2", fields)


def test_reexpress_only_writes_the_same_function_and_its_record(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stages: list[object] = []
    stage = staging.staged
    for module in (step, reexpress):
        counted = lambda *args, **named: stages.append(args) or stage(*args, **named)  # noqa: E731
        monkeypatch.setattr(module, "staged", counted, raising=False)
    done = retrofit.convert(source, reexpress_only=True, out=out)
    assert len(stages) == 1
    assert done.step == "reexpress"
    assert "gpt2 was re-expressed as gpt_bigcode" in done.report["notes"][0]
    with torch.no_grad():
        assert torch.allclose(load(source)(ids()).logits, load(out)(ids()).logits, atol=1e-4)
    assert [step["step"] for step in read_provenance(out)["steps"]] == ["reexpress"]
    assert not (tmp_path / "cache").exists()
    assert list(tmp_path.glob("*.partial")) == []
    again = retrofit.convert(source, reexpress_only=True, out=out)
    assert len(stages) == 1, "the same command finds it done"
    assert "done before" in again.report["notes"][0]
    with pytest.raises(UserError, match="not empty"):
        retrofit.convert(source, reexpress_only=True, dtype="float16", out=out)


def test_a_conversion_re_expresses_first_and_says_so(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = retrofit.convert(source, kv_heads=1, method="mean", out=out)
    assert "gpt2 was re-expressed as gpt_bigcode" in done.report["notes"][0]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "gpt_bigcode"
    assert model.config.multi_query
    record = read_provenance(out)
    assert [step["step"] for step in record["steps"]] == ["convert"]
    assert "gpt2 was re-expressed as gpt_bigcode" in record["source"]["notes"][0]
    with pytest.raises(UserError, match="one KV head or one for each query head"):
        retrofit.convert(source, kv_heads=2, method="mean", out=tmp_path / "two")


@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 1, "reexpress_only": True}, {"kv_heads": 1, "target": "gpt_bigcode"}]
)
def test_one_of_the_two_is_asked_for(options: dict[str, object], source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="re-expression only"):
        retrofit.convert(source, out=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
