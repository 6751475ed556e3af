"""What a plan says of several GPUs, worked out by hand from rates and links."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from retrofit.recipe.load import load_recipe
from retrofit.workflow.estimate.cost import CostModel, Throughput
from retrofit.workflow.estimate.machines import planned_for
from retrofit.workflow.estimate.several_gpus import (
    ATTENTION_SHARE,
    SeveralGpus,
    several_gpus,
    several_gpus_lines,
    step_seconds,
)
from retrofit.workflow.estimate.training_memory import trained_parameters
from retrofit.workflow.plan import make_plan
from tests.workflow.test_gpu_estimates import BIG

EIGHT = Throughput(400e12, 50e12, "made up", 3e12, 10e-6, gpus=8, link_bytes_per_second=50e9)
RECIPE = load_recipe("gqa", ["convert.kv_heads=8", "recover.sequence_length=4096", "recover.batch_size=4"])


def found(kv_heads: int = 8, claimed: int = 131_072, speed: Throughput = EIGHT) -> SeveralGpus:
    at = several_gpus(RECIPE, CostModel(BIG, BIG.spec.with_kv_heads(kv_heads), speed, claimed))
    assert at is not None
    return at


def test_transfers_hide_from_the_length_of_the_formula() -> None:
    # n = R K item / (H B) tokens a rank
    rate = ATTENTION_SHARE * EIGHT.flops
    assert found().sequence.hidden[0] == pytest.approx(8 * rate * 8 * 2 / (32 * 50e9))
    assert found().sequence.forward == pytest.approx(1)
    assert found(claimed=4096).sequence.forward < 0.8
    assert found(kv_heads=32).sequence.hidden[0] == pytest.approx(4 * found().sequence.hidden[0])


def test_the_attention_of_a_sequence_is_shared() -> None:
    one, many = found().sequence.seconds
    flops = 32 * 4 * 128 * 32 * 131_072 * 131_073 / 2
    assert one == pytest.approx(flops / (ATTENTION_SHARE * EIGHT.flops))
    assert many == pytest.approx(one / 8)


def test_rows_of_a_step_are_dealt_out_and_their_gradients_summed() -> None:
    training = found().training
    assert training is not None
    assert RECIPE.recover is not None
    model = CostModel(BIG, BIG.spec.with_kv_heads(8), EIGHT, 131_072)
    passes = 2 + RECIPE.recover.gradient_checkpointing + 1
    row = passes * model.flops(4096, 4096) / (EIGHT.flops * 0.5)
    gradients = 4 * trained_parameters(model.after, RECIPE.recover.adapter)
    assert training.one == pytest.approx(4096 / row)
    assert training.all == pytest.approx(4 * 4096 / (row + 2 * 3 / 4 * gradients / 50e9))
    assert training.scaled == pytest.approx(8 * 4 * 4096 / (4 * row + 2 * 7 / 8 * gradients / 50e9))
    assert "(4 of them would have none)" in several_gpus_lines(found())[0]
    assert "recover.batch_size: 32" in several_gpus_lines(found())[0]


@pytest.mark.parametrize(
    ("kv_heads", "gpus", "copies", "said"),
    [
        (8, 8, 1, "with 8 KV heads 1 on each; with 32, as before, 4 on each"),
        (2, 8, 4, "every one exists 4 times: no more than 2 GPUs share them without copies"),
        (8, 5, None, "with 8 KV heads not possible"),
        (32, 8, 1, "with 32 KV heads 4 on each"),
    ],
)
def test_fewer_kv_heads_cap_a_split_of_heads(kv_heads: int, gpus: int, copies: int | None, said: str) -> None:
    at = found(kv_heads=kv_heads, speed=replace(EIGHT, gpus=gpus))
    assert at.copies[0] == copies
    assert said in several_gpus_lines(at)[-1]


def test_steps_that_are_dealt_out_take_less_time() -> None:
    one, eight = (make_plan(RECIPE, BIG, planned_for("h100", gpus)[1]) for gpus in (1, 8))
    for name in ("convert", "recover", "evaluate"):
        before, after = one.seconds_of(name), eight.seconds_of(name)
        assert before is not None
        assert after is not None
        assert after <= before
    assert one.several is None
    assert eight.several is not None
    recover = eight.of("recover")
    assert recover is not None
    assert recover.seconds < one.of("recover").seconds / 3  # type: ignore[union-attr]


def test_nothing_is_said_of_links_that_are_not_known() -> None:
    model = CostModel(BIG, BIG.spec, replace(EIGHT, link_bytes_per_second=None), 131_072)
    assert several_gpus(RECIPE, model) is None
    assert RECIPE.recover is not None
    alone = replace(EIGHT, gpus=1)
    assert step_seconds(RECIPE.recover, model, 8, 8) == step_seconds(
        RECIPE.recover, CostModel(BIG, BIG.spec, alone, 131_072), 1, 1
    )


def test_it_needs_no_torch() -> None:
    code = "import sys, retrofit.workflow.estimate.several_gpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
