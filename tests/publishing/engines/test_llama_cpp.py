"""llama.cpp, the cheapest engine of another code base, run on three checkpoints; `make test` makes its environments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evals.engines.cases import HEADS, Case
from evals.engines.work import Work
from retrofit.console import Silent
from retrofit.publishing.engines import environments

CASES = (Case("llama", HEADS), Case("llama", "yarn"), Case("qwen3", "ntk"))


def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", sys.prefix)
    found = [environments.find(name) for name in ("llama.cpp", environments.CONVERTER)]
    made = [one for one in found if one is not None]
    if len(made) < len(found):
        pytest.skip("no environment of llama.cpp: make test makes it")
    work = Work(tmp_path, Silent())
    assert [work.made(case) for case in CASES] == [None, None, None]
    here = environments.require("transformers", make=False, command="")
    references = work.references(CASES, here)
    rows = list(work.rows("llama.cpp", CASES, made, references))
    assert [row["verdict"] for row in rows] == ["same"] * len(CASES)
    assert max(row["difference"] for row in rows) < 1e-4 < 0.5 < min(row["control"] for row in rows)
