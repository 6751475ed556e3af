"""What several GPUs do for a run: data-parallel training, and one long sequence shared by all of them. Torch-free.

Times are from the rate of one GPU and the bandwidth of the links between them (`kernels.ring_cost`); latencies and
slower links between nodes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from retrofit.format import duration, tokens
from retrofit.kernels.ring_cost import (
    AttentionShape,
    Link,
    backward_time,
    forward_time,
    hidden_from,
    hidden_from_backward,
    ulysses_copies,
)
from retrofit.recipe.recovery import stages_of
from retrofit.recipe.schema import Recipe, Recover
from retrofit.workflow.estimate.cost import ADAPTER_LAUNCHES, CostModel
from retrofit.workflow.estimate.training_memory import trained_parameters

ATTENTION_SHARE = 0.5  # of the matrix rate that tiles of attention reach: 0.35 to 0.68 on an H200
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Training:
    """Tokens per second of a recovery: on one GPU, on all with the rows of the recipe's steps, and on all with as many
    rows on each as the recipe has on one."""

    one: float
    all: float
    scaled: float
    rows: int


@dataclass(frozen=True)
class LongSequence:
    """The attention of all layers over one sequence of `length` tokens. seconds: forward on one GPU, and on all.

    forward, backward: the share of ideal speed that is left beside the transfers. hidden: tokens of the whole sequence
    from which the transfers of full attention hide behind its computation, forward and backward.
    """

    length: int
    seconds: tuple[float, float]
    forward: float
    backward: float
    hidden: tuple[float, float]


@dataclass(frozen=True)
class SeveralGpus:
    """copies: how often each KV head would exist if heads were split instead (Ulysses), None where they cannot be.

    kv_heads: of the model after the recipe, and before. training: None without a recovery.
    """

    gpus: int
    link: float
    training: Training | None
    sequence: LongSequence
    kv_heads: tuple[int, int]
    copies: tuple[int | None, int | None]


def several_gpus(recipe: Recipe, model: CostModel) -> SeveralGpus | None:
    """What the GPUs of `model.throughput` do for the recipe; None for one, or where their link is not known."""
    speed = model.throughput
    if speed.gpus == 1 or speed.link_bytes_per_second is None:
        return None
    before, after = model.facts.spec.layers[0], model.after.layers[0]
    return SeveralGpus(
        speed.gpus,
        speed.link_bytes_per_second,
        _training(recipe.recover, model) if recipe.recover else None,
        _sequence(model, speed.link_bytes_per_second),
        (after.kv_heads, before.kv_heads),
        (
            ulysses_copies(after.query_heads, after.kv_heads, speed.gpus),
            ulysses_copies(before.query_heads, before.kv_heads, speed.gpus),
        ),
    )


def step_seconds(recover: Recover, model: CostModel, rows: int, processes: int) -> float:
    """Of one optimizer step of `rows` rows, dealt out to so many of the processes, and the sum of their gradients where
    the link is known: the mean of all steps of a schedule.

    A ring of N processes sends 2 (N - 1) / N times the gradients (Patarasuk and Yuan 2009).
    """
    tokens, seconds = ceil(rows / processes) * recover.sequence_length, 0.0
    stages = stages_of(recover)
    for stage in stages:
        # Forward and backward through the frozen weights, the recomputation, the teacher's forward for distillation.
        passes = 2 + recover.gradient_checkpointing + (stage.loss == "distill")
        length = stage.sequence_length or recover.sequence_length
        one = model.seconds(tokens, length, passes, call=tokens, launches=ADAPTER_LAUNCHES)
        seconds += one * stage.tokens / sum(other.tokens for other in stages)
    link = model.throughput.link_bytes_per_second
    if processes == 1 or link is None:
        return seconds
    gradients = GRADIENT_BYTES * trained_parameters(model.after, recover.adapter)
    return seconds + 2 * (processes - 1) / processes * gradients / link


def _training(recover: Recover, model: CostModel) -> Training:
    rows, gpus = recover.batch_size, model.throughput.gpus

    def rate(rows: int, processes: int) -> float:
        return rows * recover.sequence_length / step_seconds(recover, model, rows, processes)

    return Training(rate(rows, 1), rate(rows, min(rows, gpus)), rate(rows * gpus, gpus), rows)


def _sequence(model: CostModel, bandwidth: float) -> LongSequence:
    speed, length, layers = model.throughput, model.claimed, model.after.layers
    link = Link(ATTENTION_SHARE * speed.flops, bandwidth)
    shapes = [AttentionShape(x.query_heads, x.kv_heads, x.head_dim, model.value_bytes, x.window) for x in layers]
    one = sum(forward_time(length, 1, shape, link).seconds for shape in shapes)
    forward = [forward_time(length, speed.gpus, shape, link) for shape in shapes]
    backward = [backward_time(length, speed.gpus, shape, link) for shape in shapes]
    full = next((shape for shape in shapes if shape.window is None), shapes[0])
    return LongSequence(
        length,
        (one, sum(each.seconds for each in forward)),
        sum(each.compute for each in forward) / sum(each.seconds for each in forward),
        sum(each.compute for each in backward) / sum(each.seconds for each in backward),
        (speed.gpus * hidden_from(full, link), speed.gpus * hidden_from_backward(full, link)),
    )


def several_gpus_lines(found: SeveralGpus) -> list[str]:
    """Lines of a plan."""
    gpus, lines = found.gpus, []
    if found.training:
        at = found.training
        line = f"recovery: {at.one:,.0f} tokens/s on one GPU, {at.all:,.0f} on {gpus} with the {at.rows} row"
        line += f"{'' if at.rows == 1 else 's'} of its steps dealt out"
        if at.rows < gpus:
            line += f" ({gpus - at.rows} of them would have none)"
        lines.append(f"{line}; {at.scaled:,.0f} with recover.batch_size: {at.rows * gpus}")
    sequence = found.sequence
    one, many = (duration(seconds) for seconds in sequence.seconds)
    forward, backward = (tokens(max(1, round(count))) for count in sequence.hidden)
    lines.append(
        f"one sequence of {sequence.length:,} tokens over {gpus} GPUs by ring: attention forward {many} instead of "
        f"{one}, {sequence.forward:.0%} of ideal, backward {sequence.backward:.0%}; transfers hide from {forward} "
        f"tokens on (backward {backward}) at {found.link / 1e9:,.0f} GB/s"
    )
    after, before = found.kv_heads
    splits = [_split(count, copies, gpus) for count, copies in zip(found.kv_heads, found.copies, strict=True)]
    line = f"splitting heads over {gpus} GPUs instead (Ulysses): with {after} KV heads {splits[0]}"
    lines.append(line if after == before else f"{line}; with {before}, as before, {splits[1]}")
    return lines


def _split(kv_heads: int, copies: int | None, gpus: int) -> str:
    if copies is None:
        return "not possible"
    if copies == 1:
        return f"{kv_heads // gpus} on each"
    return f"every one exists {copies} times: no more than {kv_heads} GPUs share them without copies"
