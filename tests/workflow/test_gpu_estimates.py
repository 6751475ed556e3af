"""Plans for a GPU beside what was measured on one.

Measured on 2026-11-27 on an H200 (139 GiB, 16 slow cores) at commit c5f7b87, torch 2.11+cu130, transformers 5.17.
SmolLM2-135M-Instruct, and a random model of 6.9 billion parameters with 32 KV heads.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from retrofit.model.families import describe
from retrofit.recipe.load import load_recipe
from retrofit.workflow.estimate import throughput
from retrofit.workflow.estimate.cost import CostModel, ModelFacts, Throughput
from retrofit.workflow.estimate.machines import planned_for
from retrofit.workflow.plan import make_plan
from tests.workflow.test_plan import FACTS, SPEED

_, H200 = planned_for("h200")
LLAMA_7B = SimpleNamespace(
    model_type="llama",
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=11264,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    attention_bias=False,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)
BIG = ModelFacts("llama-7b", describe(LLAMA_7B), 6_900_000_000, "bfloat16")
FULL = "quickstart-full"
MEASURED = {  # seconds
    "calibrated conversion of 32,768 tokens": (22.7, "convert", FACTS, FULL, []),
    "48 training steps of 1,024 tokens": (21.0, "recover", FACTS, FULL, []),
    "search for 32,768 tokens": (102.0, "extend", FACTS, FULL, ["context={method: search, length: 32768}"]),
    "mean of 6.9 billion parameters": (63.0, "convert", BIG, FULL, ["convert={method: mean, kv_heads: 8}"]),
}


@pytest.mark.parametrize("what", MEASURED)
def test_a_plan_for_a_gpu_is_within_a_factor_of_two(what: str) -> None:
    measured, step, facts, recipe, overrides = MEASURED[what]
    cost = make_plan(load_recipe(recipe, overrides), facts, H200).of(step)
    assert cost is not None
    assert measured / 2 <= cost.seconds <= measured * 2


def test_scoring_is_within_a_factor_of_two() -> None:
    recipe = load_recipe(FULL, ["evaluate.lengths=[16384]", "evaluate.continuation_tokens=0"])
    cost = make_plan(recipe, FACTS, H200).of("evaluate")
    assert cost is not None
    measured = 2 * 16384 / 19_000  # two documents, 19,000 tokens a second
    assert measured / 2 <= cost.piece_seconds[0] <= measured * 2


def test_decoding_from_python_is_within_a_factor_of_two() -> None:
    model = CostModel(FACTS, FACTS.spec, H200, 8192)
    assert 10 / 2 <= 1 / model.decode_seconds(2048) <= 16 * 2  # 10 to 16 tokens a second


def test_a_large_model_is_bound_by_its_operations_and_not_by_launches() -> None:
    model = CostModel(BIG, BIG.spec, H200, 4096)
    whole = model.seconds(4096, 4096)
    assert whole == pytest.approx(model.flops(4096, 4096) / (H200.flops * 0.5))
    assert model.seconds(4096, 4096, call=1) == pytest.approx(4096 * model.launching)


def test_few_rows_wait_for_the_weights() -> None:
    speed = Throughput(1e15, 1e15, "no launches, slow memory", 1e9)
    model = CostModel(BIG, BIG.spec, speed, 4096)
    assert model.seconds(10, 10, call=5) == pytest.approx(2 * BIG.weight_bytes / 1e9)


def test_a_processor_launches_nothing() -> None:
    model = CostModel(FACTS, FACTS.spec, SPEED, 8192)
    assert model.launching == 0
    assert model.seconds(4096, 1024, call=1024) == pytest.approx(model.flops(4096, 1024) / (SPEED.flops * 0.5))


def test_the_launch_of_a_kernel_is_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "flops", lambda dtype, device, seconds: 7e14)
    monkeypatch.setattr(throughput, "bandwidth", lambda device: 4e12)
    monkeypatch.setattr(throughput, "launch_seconds", lambda device: 8e-6)
    monkeypatch.setattr(throughput, "multiplies_in_bfloat16", lambda device: True)
    found = throughput.measure("cuda")
    assert found.launch_seconds == 8e-6
    assert found.bytes_per_second == 4e12
    assert "8 us to launch a kernel" in found.how
    assert throughput.measure("cpu").launch_seconds == 0
