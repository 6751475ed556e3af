"""A step's rows are dealt out once each, whatever the number of processes and of rows computed at a time."""

from __future__ import annotations

import pytest
import torch

from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.objectives import IGNORED
from retrofit.recovery.schedule import TrainRows

LINES = TrainRows(torch.arange(10 * 6).view(10, 6), None, (3,) * 4 + (6,) * 6)


def dealt(ranks: int, most: int | None, *, every_token: bool) -> list[list[dict]]:
    """For each process its items."""
    every = [MicroBatches(LINES, 4, every_token=every_token, rank=r, ranks=ranks, most=most) for r in range(ranks)]
    assert len({len(one) for one in every}) == 1
    return [[one[index] for index in range(len(one))] for one in every]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [None, 1])
def test_every_row_counts_once_in_its_step(ranks, most) -> None:
    items = dealt(ranks, most, every_token=True)
    per_step = len(items[0]) // 3
    for step, rows in enumerate((range(4), range(4, 8), range(8, 10))):
        parts = [item for one in items for item in one[step * per_step : (step + 1) * per_step]]
        counted = [item["input_ids"].flatten() for item in parts if "next_ids" not in item]
        assert sorted(torch.cat(counted).tolist()) == LINES.ids_NT[list(rows)].flatten().tolist()
        assert {item["tokens"] for item in parts} == {len(rows) * 6}
        assert all(bool((item["next_ids"] == IGNORED).all()) for item in parts if "next_ids" in item)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_last_token_of_a_text_predicts_nothing(ranks) -> None:
    items = dealt(ranks, None, every_token=False)
    steps = [[one[step] for one in items] for step in range(3)]
    counted = [sum(int((item["next_ids"] != IGNORED).sum()) for item in parts) for parts in steps]
    assert counted == [4 * 4, 4 * 5, 2 * 5]  # rows of two texts, then of one
    for parts, count in zip(steps, counted, strict=True):
        assert {item["tokens"] for item in parts} == {count}
    first = steps[0][0]
    assert first["next_ids"][0].tolist() == [1, 2, IGNORED]
    assert first["input_ids"].shape[1] == 3
