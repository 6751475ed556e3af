"""What differs by device: a CPU keeps its numbers, a GPU gets those that fill it. Nothing here needs a GPU."""

from __future__ import annotations

import pytest
import torch

from retrofit.errors import UserError
from retrofit.system import device


@pytest.mark.parametrize(
    ("name", "gpu"), [("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", True), ("mps:0", True)]
)
def test_what_counts_as_a_gpu(name: str, gpu: bool) -> None:
    assert device.is_gpu(name) == gpu


def test_losses_are_read_every_step_on_a_cpu_and_in_groups_on_a_gpu() -> None:
    assert device.steps_between_readings("cpu") == 1
    assert device.steps_between_readings("cuda:0") > 1


@pytest.mark.parametrize(("fits", "expected"), [(12, 12), (11, 6), (5, 4), (1, 1)])
def test_the_micro_batch_is_the_largest_divisor_that_fits(fits: int, expected: int) -> None:
    def attempt(rows: int) -> None:
        if rows > fits:
            raise torch.OutOfMemoryError

    assert device.micro_batch(12, attempt, "mps") == expected


def test_a_cpu_takes_all_rows_without_trying() -> None:
    def never(rows: int) -> None:
        raise AssertionError

    assert device.micro_batch(12, never, "cpu") == 12


def test_a_row_that_does_not_fit_is_refused() -> None:
    def attempt(rows: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="one row") as error:
        device.micro_batch(4, attempt, "mps")
    assert "gradient_checkpointing" in str(error.value.fix)
