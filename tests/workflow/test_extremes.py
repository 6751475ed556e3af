"""What a dry run accepts, a run does: every value at the edges of its range, in a tiny run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.workflow.extremes import Extreme, extremes, outcome

ALL = tuple(extremes())
FEW = [one for one in ALL if one.key.split(".")[0] in ("convert", "context", "evaluate", "recover", "seed")]


def test_the_edges_of_all_kinds_of_keys_are_found() -> None:
    found = {one.key: [e.value for e in ALL if e.key == one.key] for one in ALL}
    assert found["seed"] == [0, 2**31 - 1]
    assert found["convert.repair"] == ["none", "o_proj", "transfer"]
    assert found["recover.warmup_ratio"][1] < 1
    assert found["evaluate.needle.lengths"] == [[64], [2**31 - 1]]
    assert found["recover.adapter.mlp"] == [False, True]
    assert len(found) > 60


@pytest.mark.parametrize("one", random.Random(2).sample(FEW, 6), ids=str)
def test_a_few_edges(one: Extreme, model: Path, texts: Path, tmp_path: Path) -> None:
    assert outcome(one, model, texts, tmp_path / "out") in ("refused", "done", "measured", "accepted")


@pytest.mark.attack
@pytest.mark.parametrize("one", ALL, ids=str)
def test_every_edge(one: Extreme, model: Path, texts: Path, tmp_path: Path) -> None:
    assert outcome(one, model, texts, tmp_path / "out") in ("refused", "done", "measured", "accepted")
