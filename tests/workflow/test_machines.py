"""Whether a plan fits this machine, or one that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

import retrofit
from retrofit.errors import UserError
from retrofit.views.results import plan as shown
from retrofit.workflow.estimate.cost import Cost
from retrofit.workflow.estimate.machines import GPUS, Machine, lacking, planned_for
from retrofit.workflow.plan import Plan
from tests.tiny import tiny_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_config("llama", max_position_embeddings=2048).save_pretrained(tmp_path)
    return tmp_path


def planned(model: Path, **options: object) -> Plan:
    return retrofit.plan("gqa", model=model, measure=False, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("memory", "disk", "before", "missing"),
    [(10, 10, 0, ""), (9, 10, 0, "memory"), (10, 10, 1, "disk"), (9, 9, 0, "memory and disk"), (None, None, 9, "")],
)
def test_a_step_lacks_what_is_more_than_there_is(
    memory: int | None, disk: int | None, before: int, missing: str
) -> None:
    assert lacking(Cost("recover", "", 10, 10, 1.0), before, Machine("m", memory, disk)) == missing


def test_a_plan_says_whether_each_step_fits_this_machine(model: Path) -> None:
    found = planned(model)
    assert list(found.lacking.values()) == [""] * 4
    table, *lines = shown(found)
    assert table.columns[-1] == "fits"  # type: ignore[union-attr]
    assert "compared with this machine" in str(lines[-1])


def test_a_plan_is_for_a_gpu_that_is_not_here(model: Path) -> None:
    one, eight = planned(model, gpu="H100"), planned(model, gpu="h100", gpus=8)
    assert one.machine
    assert one.machine.memory == 80 * 10**9
    assert one.throughput.flops == 989e12
    assert one.seconds > eight.seconds
    assert one.several is None
    lines = [str(line) for line in list(shown(eight))[1:]]
    assert "for each of 8 GPUs, one process each: torchrun --nproc-per-node=8" in " ".join(lines)
    assert [line.partition(":")[0] for line in lines[-3:]] == [
        "recovery", "one sequence of 2,048 tokens over 8 GPUs by ring", "splitting heads over 8 GPUs instead (Ulysses)",
    ]  # fmt: skip


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_numbers(name: str) -> None:
    machine, speed = planned_for(name)
    assert machine.memory
    assert speed.flops > speed.float32 > speed.bytes_per_second > 0


def test_a_gpu_that_is_not_known_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="no GPU `b9000` is known"):
        planned(model, gpu="b9000")
    with pytest.raises(UserError, match="add --gpu NAME"):
        planned(model, gpus=2)
    with pytest.raises(UserError, match="use 1 to 1,024"):
        planned(model, gpu="h100", gpus=0)
