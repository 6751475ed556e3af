"""What a run would do and cost, from the recipe and the attention spec alone.

Times are floating-point operations over a stated throughput; memory is what has to exist at one time. Both are
estimates: the journal puts what was measured beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retrofit.format import kv_per_token, nbytes
from retrofit.recipe.layers import how_many
from retrofit.recipe.schema import Recipe, Window
from retrofit.workflow.estimate.cost import (
    ASSUMED,
    EFFICIENCY,
    Cost,
    CostModel,
    ModelFacts,
    TaskSize,
    Throughput,
)
from retrofit.workflow.estimate.machines import Machine, described, lacking
from retrofit.workflow.estimate.several_gpus import SeveralGpus, several_gpus, several_gpus_lines
from retrofit.workflow.steps import steps_of

ORIGINAL = "original"
"""The label of the model before the surgery."""


@dataclass(frozen=True)
class Plan:
    """A whole run before it happens.

    KV bytes, before and after, in the source's dtype: what each of the first tokens adds (per token), what one adds
    when sliding windows are full (beyond windows), and all of the cache at the last of `positions`.
    machine: what the steps have to fit, where that is asked. several: what more than one GPU does for it.
    processes: of a launcher; shared: the steps that all of them take part in.
    """

    recipe: str
    model: str
    steps: tuple[Cost, ...]
    kv_heads: tuple[int, int]
    kv_bytes_per_token: tuple[int, int]
    kv_bytes_beyond_windows: tuple[int, int]
    kv_cache_bytes: tuple[int, int]
    positions: tuple[int, int]
    throughput: Throughput
    machine: Machine | None = None
    several: SeveralGpus | None = None
    processes: int = 1
    shared: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the run folder will hold when done."""
        return sum(step.disk_bytes for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """Memory of the hungriest step."""
        return max((step.peak_bytes for step in self.steps), default=0)

    def seconds_of(self, name: str) -> float | None:
        """Seconds of a line of the journal: a step without its pieces, or one piece (`evaluate:original`, and
        `evaluate:original:arc_easy` for a task)."""
        step, _, piece = name.partition(":")
        _, _, task = piece.partition(":")
        cost = self.of(step)
        if cost is None:
            return None
        if task:
            return cost.task_seconds.get(task)
        if piece:
            return cost.piece_seconds[0 if piece == ORIGINAL else -1]
        asked = len(cost.piece_seconds) * sum(cost.task_seconds.values())
        return cost.seconds - sum(cost.piece_seconds) - asked

    @property
    def lacking(self) -> dict[str, str]:
        """By step, what its machine has not enough of: memory, disk, both, or nothing."""
        found, written = {}, 0
        for cost in self.steps if self.machine else ():
            assert self.machine
            found[cost.step] = lacking(cost, written, self.machine)
            written += cost.disk_bytes
        return found

    def of(self, step: str) -> Cost | None:
        """The cost of one step, None when the recipe has no such step."""
        return next((cost for cost in self.steps if cost.step == step), None)


def claimed_length(recipe: Recipe, native: int) -> int:
    """Positions the result will claim: the recipe's length or factor x native, else the native ones."""
    return recipe.context.target(native) if recipe.context else native


def make_plan(
    recipe: Recipe,
    facts: ModelFacts,
    throughput: Throughput = ASSUMED,
    tasks: Sequence[TaskSize] = (),
    processes: int = 1,
) -> Plan:
    """The plan of `recipe` on a model. Nothing is read, written or loaded. tasks: those that are asked. processes: of
    the launcher."""
    before = facts.spec
    after = before.with_kv_heads(recipe.convert.kv_heads) if recipe.convert else before
    if recipe.window:
        after = after.with_windows(recipe.window.size, _windowed(recipe.window, len(before.layers)))
    claimed = claimed_length(recipe, before.max_position_embeddings)
    model = CostModel(facts, after, throughput, claimed, tuple(tasks), processes)
    size = model.value_bytes
    steps = steps_of(recipe)
    return Plan(
        recipe=recipe.name,
        model=facts.model,
        steps=tuple(step.estimate(model) for step in steps),
        kv_heads=(before.layers[0].kv_heads, after.layers[0].kv_heads),
        kv_bytes_per_token=(before.kv_bytes_per_token(size), after.kv_bytes_per_token(size)),
        kv_bytes_beyond_windows=(before.kv_bytes_beyond_windows(size), after.kv_bytes_beyond_windows(size)),
        kv_cache_bytes=(before.kv_cache_bytes(claimed, size), after.kv_cache_bytes(claimed, size)),
        positions=(model.native, claimed),
        throughput=throughput,
        several=several_gpus(recipe, model),
        processes=processes,
        shared=tuple(step.name for step in steps if step.distributed),
    )


def _windowed(window: Window, layers: int) -> frozenset[int]:
    """The layers that will have windows: which, or how many, where that is measured, is a guess: all but a quarter."""
    if isinstance(window.full_layers, tuple):
        return frozenset(range(layers)) - set(window.full_layers)
    full = how_many(window.full_layers, layers)
    return frozenset(range(-(-layers // 4) if full is None else full, layers))


def describe_plan(plan: Plan) -> list[str]:
    """Lines below the table of a plan."""
    before, after = map(kv_per_token, plan.kv_bytes_per_token, plan.kv_bytes_beyond_windows)
    lines = [
        f"KV heads {plan.kv_heads[0]} -> {plan.kv_heads[1]}, positions {plan.positions[0]:,} -> {plan.positions[1]:,}",
        f"KV cache per token: {before} -> {after}; "
        f"{nbytes(plan.kv_cache_bytes[0])} -> {nbytes(plan.kv_cache_bytes[1])} at {plan.positions[1]:,} tokens",
        f"time: operations counted from the model's shape, at {EFFICIENCY:.0%} of {plan.throughput.how}",
    ]
    lines += [described(plan.machine)] if plan.machine else []
    if plan.processes > 1:
        alone = ", ".join(step.step for step in plan.steps if step.step not in plan.shared)
        lines.append(
            f"{plan.processes} processes: all of them share {', '.join(plan.shared) or 'nothing'}"
            + (f"; rank 0 does {alone} alone" if alone else "")
            + (". The times in the table are those of one process" if plan.throughput.gpus == 1 else "")
        )
    return lines + (several_gpus_lines(plan.several) if plan.several else [])
