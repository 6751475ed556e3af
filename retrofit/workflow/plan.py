"""What a run would do and cost, from the recipe and the attention spec alone. Torch-free.

Times are floating-point operations over a stated throughput; memory is what has to exist at one time. Both are
estimates: the journal puts what was measured beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from retrofit.context.search.candidates import NEAR, TAIL, rungs
from retrofit.evaluation.long_context import further_reading, passes_of, questions_read
from retrofit.format import nbytes
from retrofit.model.families.experts import EXPERTS
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Context, Convert, Evaluate, Recipe, Recover, TextSource
from retrofit.workflow.estimate.flops import (
    ASSUMED,
    BASE_BYTES,
    CALL_SECONDS,
    DTYPE_BYTES,
    EFFICIENCY,
    TOKEN_BYTES,
    ModelFacts,
    Shape,
    TaskSize,
    Throughput,
)
from retrofit.workflow.estimate.training_memory import trained_parameters, training_memory

STEPS = ("convert", "extend", "recover", "evaluate", "publish")
FOLDERS = {name: f"{number}-{name}" for number, name in enumerate(STEPS, start=1)}
COST_ROUNDS = 4  # turns of the first and the last model when what they cost to run is measured
PROMPTS_CONTINUED = 3  # short ones, by each model
MACHINE_SECONDS = 1.0  # of measuring the machine's own speed beside a model's
PROOF_SECONDS = 5.0  # of loading a model once more and proving its kernel
TRANSFER_PASSES = 7  # forward and backward twice over the text that is trained on, and what is held out, four times
ROW_BYTES = 16  # of a token that is kept, and of what is known about it
PACKED_BYTES = 60  # of a token while rows are packed: it is a Python number
BATCH_TOKENS = 8192  # of a calibration batch
SAMPLED_TOKENS = 20_480  # of the original's own text, as `recover.samples.Teacher` asks for: one batch
MOST_SAMPLED = 65_536  # for training, which may read them again
SAMPLE_ROWS = 40  # texts that it writes at a time


@dataclass(frozen=True)
class Cost:
    """One step: what it does, the most memory and disk it needs (bytes), and its seconds in all.

    pieces: parts that the journal keeps for themselves (the models that are scored), piece_seconds: of each.
    task_seconds: of each task that every one of these models is asked, kept for itself too.
    """

    step: str
    does: str
    peak_bytes: int
    disk_bytes: int
    seconds: float
    pieces: int = 0
    piece_seconds: float = 0.0
    task_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A whole run before it happens. KV bytes are per token in the source's dtype, sliding windows ignored."""

    recipe: str
    model: str
    steps: tuple[Cost, ...]
    kv_heads: tuple[int, int]
    kv_bytes_per_token: tuple[int, int]
    kv_cache_bytes: tuple[int, int]
    positions: tuple[int, int]
    throughput: Throughput

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
        each = cost.piece_seconds + sum(cost.task_seconds.values())
        return cost.piece_seconds if piece else cost.seconds - cost.pieces * each

    def of(self, step: str) -> Cost | None:
        """The cost of one step, None when the recipe has no such step."""
        return next((cost for cost in self.steps if cost.step == step), None)


def steps_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the steps that a recipe has, in order."""
    sections = (recipe.convert, recipe.context, recipe.recover, recipe.evaluate, recipe.publish)
    return tuple(name for name, section in zip(STEPS, sections, strict=True) if section is not None)


def claimed_length(recipe: Recipe, native: int) -> int:
    """Positions the result will claim: the recipe's length or factor x native, else the native ones."""
    return recipe.context.target(native) if recipe.context else native


def converted_spec(spec: AttentionSpec, kv_heads: int | None) -> AttentionSpec:
    """The spec with `kv_heads` KV heads in every layer (unchanged for None)."""
    if kv_heads is None:
        return spec
    return replace(spec, layers=tuple(replace(layer, kv_heads=kv_heads) for layer in spec.layers))


def make_plan(
    recipe: Recipe, facts: ModelFacts, throughput: Throughput = ASSUMED, tasks: Sequence[TaskSize] = ()
) -> Plan:
    """The plan of `recipe` on a model. Nothing is read, written or loaded. tasks: those of `evaluate.tasks`."""
    before = facts.spec
    after = converted_spec(before, recipe.convert.kv_heads if recipe.convert else None)
    native = before.max_position_embeddings
    claimed = claimed_length(recipe, native)
    bytes_per_value = DTYPE_BYTES.get(facts.dtype, 2)
    shape = Shape(facts, after, throughput)
    costs = []
    for step in steps_of(recipe):
        if step == "convert" and recipe.convert:
            costs.append(_convert(shape, recipe.convert))
        elif step == "extend" and recipe.context:
            costs.append(_extend(shape, recipe.context, native, claimed))
        elif step == "recover" and recipe.recover:
            costs.append(_recover(shape, recipe.recover))
        elif step == "evaluate" and recipe.evaluate:
            costs.append(_evaluate(shape, recipe, recipe.evaluate, tasks))
        elif step == "publish" and recipe.publish:
            tokens = recipe.publish.reload_tokens * len(recipe.evaluate.text if recipe.evaluate else ())
            seconds = 15 + shape.seconds(tokens, recipe.publish.reload_tokens)
            does = "check the gate, write the card, load the folder in a fresh process and compare its losses"
            peak = BASE_BYTES + 2 * facts.weight_bytes
            costs.append(Cost(step, does, peak, facts.weight_bytes, seconds))
    return Plan(
        recipe=recipe.name,
        model=facts.model,
        steps=tuple(costs),
        kv_heads=(before.layers[0].kv_heads, after.layers[0].kv_heads),
        kv_bytes_per_token=(before.kv_bytes_per_token(bytes_per_value), after.kv_bytes_per_token(bytes_per_value)),
        kv_cache_bytes=(
            before.kv_cache_bytes(claimed, bytes_per_value),
            after.kv_cache_bytes(claimed, bytes_per_value),
        ),
        positions=(native, claimed),
        throughput=throughput,
    )


def _convert(shape: Shape, convert: Convert) -> Cost:
    spec, facts = shape.facts.spec, shape.facts
    heads = f"{spec.layers[0].kv_heads} to {convert.kv_heads} KV heads in {len(spec.layers)} layers, {convert.method}"
    if not convert.calibrates:
        seconds = 4 * facts.weight_bytes / shape.throughput.bytes_per_second + 1
        return Cost("convert", heads, BASE_BYTES + facts.weight_bytes // len(spec.layers), facts.weight_bytes, seconds)
    tokens, length = convert.calibration.tokens, convert.calibration.sequence_length
    repair = f" and the {convert.repair} repair" if convert.repair != "none" else ""
    first = spec.layers[0]
    # In float32: a batch's stream and what one layer makes of it, the embeddings or one layer, its projections in
    # float64, Grams of all values and of all head outputs (for each fold, and for their sums).
    batch = min(tokens, BATCH_TOKENS) * (16 * spec.hidden_size + 4 * shape.layer_parameters // spec.hidden_size)
    layer = max(4 * spec.vocab_size * spec.hidden_size, 16 * shape.layer_parameters)
    folds = 2 * len(convert.calibration.text) + 5
    columns = first.query_heads * first.head_dim
    grams = 8 * (4 * (first.kv_heads * first.head_dim) ** 2 + folds * columns * (columns + spec.hidden_size))
    peak = BASE_BYTES + max(batch + layer + grams, PACKED_BYTES * tokens)
    does = f"{heads}{repair} on {tokens:,} tokens"
    # Each stream passes every layer once; the moments and refits between are about half a pass in float32.
    seconds = shape.seconds(tokens, length, passes=2) + shape.seconds(tokens, length, passes=0.5, float32=True)
    if convert.repair == "transfer":
        seconds += TRANSFER_PASSES * shape.attention_flops(tokens, length) / (shape.throughput.flops * EFFICIENCY)
    sampled = sampled_tokens(convert.calibration.text, tokens)
    if sampled:
        does += f", {sampled:,} sampled from the original first (kept for later runs)"
        peak = max(peak, BASE_BYTES + 2 * facts.weight_bytes)
        # A step of a batch reads all weights and multiplies them with its rows.
        rows, steps = SAMPLE_ROWS, -(-sampled // SAMPLE_ROWS)
        read = facts.weight_bytes / shape.throughput.bytes_per_second
        multiply = 2 * rows * shape.matmul_parameters / (shape.throughput.flops * EFFICIENCY)
        seconds += steps * (max(read, multiply) + CALL_SECONDS * len(spec.layers))
    # Upper triangles of two Grams of all values are most of the moments that stay.
    moments = len(spec.layers) * 4 * (first.kv_heads * first.head_dim) ** 2
    return Cost("convert", does, peak, facts.weight_bytes + moments, seconds)


def sampled_tokens(text: Sequence[TextSource], tokens: int) -> int:
    """Tokens that the original is asked to write, for the source `self`: enough for its share of `tokens` without what
    is held out, and the same number for every recipe where that suffices. 0 where it is not among the sources."""
    total = sum(source.weight for source in text)
    own = sum(source.weight for source in text if source.source == "self")
    return max(SAMPLED_TOKENS, math.ceil(1.25 * tokens * own / total)) if own else 0


def _extend(shape: Shape, context: Context, native: int, claimed: int) -> Cost:
    facts, spec = shape.facts, shape.after
    does = f"{context.method}: {native:,} to {claimed:,} positions"
    if not any(layer.rope for layer in spec.layers):
        table = DTYPE_BYTES.get(facts.dtype, 2) * claimed * spec.hidden_size
        return Cost("extend", f"{does}; the position table is interpolated", BASE_BYTES, facts.weight_bytes + table, 2)
    search = context.searches
    if search is None and context.attention_factor is None:
        seconds = 1.0 + 2 * facts.weight_bytes / shape.throughput.bytes_per_second
        return Cost("extend", f"{does}; only config.json changes", BASE_BYTES, facts.weight_bytes, seconds)
    if search is None:
        does += f"; the weights of the queries hold the attention factor {context.attention_factor:g}"
        return Cost("extend", does, BASE_BYTES, facts.weight_bytes, 2)
    plan = rungs(claimed, search.tokens_for(claimed))
    seconds = 0.0
    for rung, (size, count) in enumerate(plan, start=1):
        seconds += shape.seconds(min(size, native), size)
        if size == claimed or rung == 1:
            seconds += shape.seconds(size * count, size)
        else:  # all of the window is read, the last tokens see all of it
            tail = min(TAIL, claimed // 4)
            seconds += shape.seconds((claimed - tail) * count, 2 * (claimed // NEAR))
            seconds += shape.seconds(tail * count, 2 * claimed)
    cache = spec.kv_cache_bytes(claimed, 4)
    tried = ", ".join(f"{count} x {size:,}" for size, count in plan)
    does += f"; encodings x tokens that each counts as: {tried}"
    # The winner's attention factor may have to be written into the weights.
    return Cost("extend", does, BASE_BYTES + 2 * facts.weight_bytes + cache, facts.weight_bytes, seconds)


def _recover(shape: Shape, recover: Recover) -> Cost:
    spec, facts, adapter = shape.after, shape.facts, recover.adapter
    batch = min(recover.batch_size, -(-recover.tokens // recover.sequence_length))
    rows = batch * recover.sequence_length
    # Forward and backward through the frozen weights, the recomputation, the teacher's forward for distillation.
    passes = 2 + recover.gradient_checkpointing + (recover.loss == "distill")
    read = recover.model_copy(update={"batch_size": batch})
    memory = training_memory(spec, facts.spec, facts.parameters, read, shape.training_bytes)
    text = recover.tokens + recover.eval_tokens
    peak = BASE_BYTES + max(memory.total + ROW_BYTES * text, PACKED_BYTES * text)
    trained = trained_parameters(spec, adapter)
    held_out = (recover.evals + 1) * recover.eval_tokens
    seconds = shape.seconds(recover.tokens, recover.sequence_length, passes) + shape.seconds(
        held_out, recover.sequence_length, passes=2
    )
    steps = max(1, recover.tokens // rows)
    does = f"{recover.loss}, LoRA rank {adapter.rank}, {recover.tokens:,} tokens in {steps:,} steps of {rows:,}"
    if adapter.mlp and spec.family in EXPERTS:
        does += "; the experts carry no adapters"
    return Cost("recover", does, peak, facts.weight_bytes + 12 * trained, seconds)


def _evaluate(shape: Shape, recipe: Recipe, evaluate: Evaluate, tasks: Sequence[TaskSize]) -> Cost:
    spec, facts = shape.facts.spec, shape.facts
    longest = max(evaluate.lengths)
    documents = evaluate.documents * len(evaluate.text)
    models = 1 + (recipe.convert is not None or recipe.context is not None) + (recipe.recover is not None)
    bytes_per_value = DTYPE_BYTES.get(facts.dtype, 2)
    cache = spec.kv_cache_bytes(longest, bytes_per_value)
    chunk = min(evaluate.chunk, longest)
    needle, ruler = evaluate.needle, evaluate.ruler
    asked = sum(needle.lengths) * needle.samples * (1 if needle.together else needle.depths) if needle else 0
    asked += sum(ruler.lengths) * ruler.samples * len(ruler.tasks) if ruler else 0
    held = ROW_BYTES * documents * max(longest, evaluate.document_tokens or 0) + 8 * asked
    peak = BASE_BYTES + 2 * facts.weight_bytes + cache + 3 * chunk * spec.vocab_size * 4 + held
    window = claimed_length(recipe, spec.max_position_embeddings)
    costed = sorted({min(length, window) for length in evaluate.cost_lengths})
    if costed:  # one pass at once holds what the matrices of one layer give
        peak = max(peak, BASE_BYTES + 2 * facts.weight_bytes + shape.prefill_bytes(costed[-1]))
    piece = shape.seconds(documents * longest, longest)
    further = further_reading(evaluate, spec.max_position_embeddings)
    piece += sum(shape.seconds(documents * tokens, context) for tokens, context in further)
    piece += sum(shape.seconds(tokens, context) for tokens, context in questions_read(evaluate))
    piece += PROMPTS_CONTINUED * evaluate.continuation_tokens * shape.decode_seconds(0)
    running = MACHINE_SECONDS + sum(shape.run_seconds(n, evaluate) for n in costed) if costed else 0.0
    turns = 2 * COST_ROUNDS if models > 1 else 1
    lengths = ", ".join(f"{length:,}" for length in evaluate.lengths)
    does = f"{models} models on {documents} documents at {lengths} tokens, one pass each"
    if further or evaluate.needle or evaluate.ruler:
        does += ", then the use of their context"
    batch_size = evaluate.tasks.batch_size if evaluate.tasks else 1
    task_seconds = {task.name: shape.task_seconds(task, batch_size) for task in tasks}
    if tasks:
        questions, requests = sum(task.questions for task in tasks), sum(task.requests for task in tasks)
        tokens = sum(task.requests * task.request_bytes for task in tasks) / TOKEN_BYTES
        does += (
            f", then {questions:,} questions of {', '.join(task.name for task in tasks)}, each model: about "
            f"{requests:,} requests and {tokens:,.0f} tokens, estimated at {TOKEN_BYTES} bytes a token"
        )
        # The harness keeps the logits of a batch and their log-probabilities, in float32 where the model is.
        rows = batch_size * min(max(task.longest_bytes for task in tasks) // TOKEN_BYTES, spec.max_position_embeddings)
        peak = max(peak, BASE_BYTES + 2 * facts.weight_bytes + 8 * rows * spec.vocab_size)
    disk = models * documents * longest * 8 * (1 + len(passes_of(evaluate, spec.max_position_embeddings)))
    seconds = models * (piece + sum(task_seconds.values())) + turns * running + PROOF_SECONDS
    return Cost("evaluate", does, peak, disk, seconds, pieces=models, piece_seconds=piece, task_seconds=task_seconds)


def describe_plan(plan: Plan) -> list[str]:
    """Lines below the table of a plan."""
    before, after = plan.kv_bytes_per_token
    lines = [
        f"KV heads {plan.kv_heads[0]} -> {plan.kv_heads[1]}, positions {plan.positions[0]:,} -> {plan.positions[1]:,}",
        f"KV cache {nbytes(before)} -> {nbytes(after)} per token; "
        f"{nbytes(plan.kv_cache_bytes[0])} -> {nbytes(plan.kv_cache_bytes[1])} at {plan.positions[1]:,} tokens",
        f"time: operations counted from the model's shape, at {EFFICIENCY:.0%} of {plan.throughput.how}",
    ]
    return lines
