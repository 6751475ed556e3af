"""Plans: torch-free arithmetic from the recipe and the spec, checked against numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import retrofit
from retrofit.evaluation.running import COST_ROUNDS
from retrofit.format import nbytes
from retrofit.model.families import describe
from retrofit.recipe.load import load_recipe
from retrofit.recipe.resolve import resolved
from retrofit.recipe.schema import Recipe
from retrofit.workflow.estimate import throughput
from retrofit.workflow.estimate.cost import CALL_SECONDS, EFFICIENCY, CostModel, ModelFacts, Throughput
from retrofit.workflow.estimate.evaluation import MACHINE_SECONDS
from retrofit.workflow.plan import describe_plan, make_plan
from retrofit.workflow.steps import steps_of
from tests.tiny import tiny_config

SMOLLM2 = SimpleNamespace(
    model_type="llama",
    num_hidden_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    attention_bias=False,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
)
FACTS = ModelFacts("smollm2", describe(SMOLLM2), 134_515_008, "bfloat16")
SPEED = Throughput(100e9, 25e9, "100 GFLOP/s for this test")


def test_kv_cache_before_and_after_is_exact() -> None:
    plan = make_plan(load_recipe("quickstart"), FACTS, SPEED)
    per_head = 2 * 64 * 2 * 30  # K and V, head dim, bytes of bfloat16, layers
    assert plan.kv_heads == (3, 1)
    assert plan.kv_bytes_per_token == (3 * per_head, per_head)
    assert plan.positions == (8192, 16384)
    assert plan.kv_cache_bytes == (3 * per_head * 16384, per_head * 16384)


def test_time_is_operations_over_throughput() -> None:
    skipped = ["evaluate.cost_lengths=[]", "evaluate.continuation_tokens=0"]
    asked = ["evaluate.text=[python-docs, python-stdlib]", "evaluate.lengths=[1000]", "evaluate.intermediate=true"]
    recipe = load_recipe("quickstart", [*asked, *skipped])
    assert recipe.evaluate is not None
    evaluate = make_plan(recipe, FACTS, SPEED).of("evaluate")
    assert evaluate is not None
    tokens = 3 * 2 * 1000  # three models, one document of each of two sources
    flops = tokens * (2 * 134_515_008 + 30 * 4 * 9 * 64 * 1000 / 2)
    assert evaluate.seconds == pytest.approx(flops / (100e9 * EFFICIENCY) + 5)


def test_a_plan_without_costs_is_that_of_a_recipe_without_them(model: Path) -> None:
    def seconds(*, no_cost: bool = False, **evaluate: object) -> float:
        section = None if "none" in evaluate else {"lengths": [64], **evaluate}
        recipe = {"name": "mine", "convert": {"kv_heads": 1, "method": "mean"}, "evaluate": section, "publish": None}
        asked = Recipe.model_validate(recipe)
        return retrofit.plan(asked, model=model, no_cost=no_cost, measure=False, progress=False).seconds

    assert seconds(no_cost=True) == seconds(cost_lengths=[]) < seconds()
    assert seconds(no_cost=True, none=True) == seconds(none=True)


def test_running_is_priced_at_each_length_up_to_the_window() -> None:
    def seconds(*overrides: str) -> float:
        step = make_plan(load_recipe("quickstart", ["evaluate.lengths=[1000]", *overrides]), FACTS, SPEED).of(
            "evaluate"
        )
        assert step is not None
        return step.seconds

    without = seconds("evaluate.cost_lengths=[]")
    prefill = 2 * 134_515_008 * 2048 + 30 * 4 * 9 * 64 * 2048 * 2048 / 2
    turns = 2 * COST_ROUNDS  # the original and the recovered
    cost = turns * (prefill / (100e9 * EFFICIENCY) + MACHINE_SECONDS)
    assert seconds("evaluate.cost_lengths=[2048]", "evaluate.decode_tokens=0") - without == pytest.approx(cost)
    read = (2 * 134_515_008 + 2 * 3 * 64 * 2 * 30 * 2048) / SPEED.bytes_per_second + CALL_SECONDS * 30
    more = seconds("evaluate.cost_lengths=[2048]", "evaluate.decode_tokens=10") - without
    assert more == pytest.approx(cost + turns * 10 * read)
    beyond = seconds("evaluate.cost_lengths=[16384, 1000000]")
    assert beyond == pytest.approx(seconds("evaluate.cost_lengths=[16384]")), "cut to the window the recipe makes"


def test_the_original_is_priced_at_the_lengths_that_it_is_asked() -> None:
    def seconds(lengths: str, piece: str) -> float:
        tests = [f"evaluate.needle.lengths={lengths}", f"evaluate.ruler.lengths={lengths}"]
        found = make_plan(load_recipe("quickstart", tests), FACTS, SPEED).seconds_of(f"evaluate:{piece}")
        assert found is not None
        return found

    assert seconds("[4096,16384]", "original") == seconds("[4096]", "original")
    assert seconds("[4096,16384]", "recovered") > 4 * seconds("[4096]", "recovered")
    assert seconds("[4096]", "recovered") == seconds("[4096]", "original")


@pytest.mark.parametrize("tokens", ["recover.tokens", "convert.calibration.tokens"])
def test_twice_the_tokens_take_twice_the_time(tokens: str) -> None:
    def step_of(count: int) -> float:
        overrides = ["recover.eval_tokens=64", "recover.evals=1", f"{tokens}={count}"]
        step = make_plan(load_recipe("quickstart", overrides), FACTS, SPEED).of(tokens.split(".")[0])
        assert step is not None
        return step.seconds

    assert step_of(2 * 196_608) == pytest.approx(2 * step_of(196_608), rel=0.01)


def test_a_plan_has_the_steps_of_its_recipe() -> None:
    assert [step.name for step in steps_of(load_recipe("kernel-only"))] == ["evaluate"]
    plan = make_plan(resolved(load_recipe("extend-4x"), 8192, 8192, (1, 3))[0], FACTS, SPEED)
    assert [cost.step for cost in plan.steps] == ["extend", "recover", "evaluate", "publish"]
    assert plan.positions == (8192, 32768)
    assert plan.kv_bytes_per_token[0] == plan.kv_bytes_per_token[1]
    assert plan.disk_bytes == sum(cost.disk_bytes for cost in plan.steps) > 2 * FACTS.weight_bytes


def test_a_sliding_window_bounds_the_cache() -> None:
    spec = describe(tiny_config("gemma3_text"))
    plan = make_plan(load_recipe("mqa"), ModelFacts("tiny", spec, 100_000, "float32"), SPEED)
    window, full = 32, 512
    each = 2 * 4 * 16 * 4
    assert plan.kv_cache_bytes[0] == each * (window + full)
    assert (plan.kv_bytes_per_token[0], plan.kv_bytes_beyond_windows[0]) == (2 * each, each)
    assert f"{nbytes(2 * each)} ({nbytes(each)} once sliding windows are full)" in describe_plan(plan)[1]


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; import retrofit.workflow.plan, retrofit.recipe.load, retrofit.workflow.journal, retrofit.console; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("tokens", "loss", "checkpointing", "measured_mib"),
    # evals/results/recovery.md: SmolLM2-135M in bfloat16, each in a process of its own.
    [
        (2048, "lm", False, 2631),
        (2048, "distill", False, 2647),
        (2048, "lm", True, 1075),
        (2048, "distill", True, 1150),
        (4096, "lm", False, 4420),
        (4096, "distill", False, 4505),
        (4096, "lm", True, 1489),
        (4096, "distill", True, 1457),
    ],
)
def test_memory_of_training_is_near_what_was_measured(
    tokens: int, loss: str, checkpointing: bool, measured_mib: int
) -> None:
    overrides = [f"recover.sequence_length={tokens}", f"recover.loss={loss}", "recover.adapter.rank=16"]
    recipe = load_recipe("quickstart", [*overrides, f"recover.gradient_checkpointing={str(checkpointing).lower()}"])
    recover = make_plan(recipe, FACTS, SPEED).of("recover")
    assert recover is not None
    # The plan allows for what other steps have imported, so it is never below and not far above.
    assert measured_mib <= recover.peak_bytes / 2**20 <= measured_mib + 550


def test_time_of_sampling_is_near_what_was_measured() -> None:
    speed = Throughput(446e9, 99e9, "products of the machine of evals/results/sampling.md, by processor time")
    model = CostModel(FACTS, FACTS.spec, speed, 8192)
    assert 64 * 512 / model.sampling_seconds(64 * 512) == pytest.approx(470, rel=0.3)
    assert 32 * 512 / model.sampling_seconds(32 * 512) == pytest.approx(380, rel=0.3)
    assert model.sampling_seconds(128 * 512) == pytest.approx(2 * model.sampling_seconds(64 * 512))


def test_memory_of_the_quickstart_is_near_what_was_measured() -> None:
    float32 = Throughput(80e9, 80e9, "a processor without bfloat16 products")
    recover = make_plan(load_recipe("quickstart-full"), FACTS, float32).of("recover")  # which that page measured
    assert recover is not None
    assert recover.peak_bytes / 2**30 == pytest.approx(3.50, rel=0.05), "evals/results/quickstart.md"


def test_checkpointing_costs_a_pass_and_saves_memory() -> None:
    without, with_ = (
        make_plan(load_recipe("quickstart", [f"recover.gradient_checkpointing={on}"]), FACTS, SPEED).of("recover")
        for on in ("false", "true")
    )
    assert without
    assert with_
    assert without.peak_bytes > with_.peak_bytes
    assert without.seconds < with_.seconds


def test_experts_without_adapters_are_told_of() -> None:
    recipe = load_recipe("quickstart")
    said = []
    for family in ("llama", "mixtral"):
        step = make_plan(recipe, ModelFacts("tiny", describe(tiny_config(family)), 10**6, "float32")).of("recover")
        assert step is not None
        said.append("the experts carry no adapters" in step.does)
    assert said == [False, True]


def test_a_plan_times_the_products_that_are_used(bfloat16_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[torch.dtype] = []

    def flops(dtype: torch.dtype, device: str, seconds: float) -> float:
        timed.append(dtype)
        return 4e9 if dtype == torch.bfloat16 else 1e9

    monkeypatch.setattr(throughput, "flops", flops)
    found = throughput.measure()
    assert timed == [torch.float32, torch.bfloat16][: 1 + bfloat16_products]
    assert (found.flops, found.float32) == (4e9 if bfloat16_products else 1e9, 1e9)
    assert ("in bfloat16" in found.how) == bfloat16_products


def test_a_plan_for_several_processes_says_who_does_what() -> None:
    recipe = resolved(load_recipe("quickstart"), 8192, 8192, [1, 3])[0]
    plan = make_plan(recipe, FACTS, SPEED, processes=4)
    assert plan.shared == ("convert", "recover", "evaluate")
    assert describe_plan(plan)[-1] == (
        "4 processes: all of them share convert, recover, evaluate; rank 0 does extend, publish alone. "
        "The times in the table are those of one process"
    )
    assert not any("processes" in line for line in describe_plan(make_plan(recipe, FACTS, SPEED)))


def test_a_plan_says_what_shares_a_row_and_what_splitting_heads_would_come_to() -> None:
    recipe = load_recipe("quickstart", ["recover.distribute.sequence=3", "device=cpu"])
    recover = make_plan(recipe, FACTS, SPEED).of("recover")
    assert recover is not None
    assert "3 processes share every row (ring: torch's context parallelism cannot: it needs CUDA)" in recover.does
    assert "would put 3 copies of each of 1 KV head on them" in recover.does


def test_split_weights_take_less_memory() -> None:
    whole, split = (
        make_plan(load_recipe("quickstart", [f"recover.distribute.shard={shard}"]), FACTS, SPEED).of("recover")
        for shard in ("auto", 8)
    )
    assert whole is not None
    assert split is not None
    assert split.peak_bytes < whole.peak_bytes
