"""What an evaluation takes: passes over documents, tests, tasks, and the cost of running."""

from __future__ import annotations

from retrofit.evaluation.long_context import further_reading, passes_of, questions_read
from retrofit.evaluation.running import COST_ROUNDS
from retrofit.evaluation.tasks.within import within_window
from retrofit.format import duration
from retrofit.recipe.schema import Evaluate, Recipe
from retrofit.system.device import token_bytes
from retrofit.workflow.estimate.cost import BASE_BYTES, TOKEN_BYTES, Cost, CostModel
from retrofit.workflow.samples import sampled_in

PROMPTS_CONTINUED = 3  # short ones, by each model
MACHINE_SECONDS = 1.0  # of measuring the machine's own speed beside a model's
PROOF_SECONDS = 5.0  # of loading a model once more and proving its kernel
LOGIT_ROWS = 512  # at most, and some room
TOLD_SECONDS = 5.0  # of making prompts, from which on a plan speaks of it
ROW_BYTES = 16  # of a token that is kept, and of what is known about it


def evaluation_cost(recipe: Recipe, evaluate: Evaluate, model: CostModel) -> Cost:
    """What measuring the models of a recipe takes."""
    spec, facts = model.facts.spec, model.facts
    longest, native = max(evaluate.lengths), model.native
    documents = evaluate.documents * len(evaluate.text)
    models = 1 + (recipe.convert is not None or recipe.context is not None) + (recipe.recover is not None)
    models = models if evaluate.intermediate else min(models, 2)
    cache, chunk = spec.kv_cache_bytes(longest, model.value_bytes), min(evaluate.chunk, longest)
    needle, ruler = evaluate.needle, evaluate.ruler
    asked = sum(needle.lengths) * needle.samples * (1 if needle.multi_key else needle.depths) if needle else 0
    asked += sum(ruler.lengths) * ruler.samples * len(ruler.tasks) if ruler else 0
    held = ROW_BYTES * documents * max(longest, evaluate.document_tokens or 0) + 8 * asked
    loaded = BASE_BYTES + 2 * facts.weight_bytes
    # Logits exist for some rows at a time; inside the layers a long chunk takes more than they do.
    logits, inside = 3 * min(chunk, LOGIT_ROWS) * spec.vocab_size * 4, chunk * token_bytes(spec, model.value_bytes)
    peak = loaded + cache + max(logits, inside) + held
    costed = sorted({min(length, model.claimed) for length in evaluate.cost_lengths})
    if costed:  # one pass at once holds what the matrices of one layer give
        peak = max(peak, loaded + model.prefill_bytes(costed[-1]))
    share = model.dealt(documents)
    piece = share * model.seconds(documents * longest, longest, call=chunk)
    further = further_reading(evaluate, native)
    piece += share * sum(model.seconds(documents * tokens, n, call=min(chunk, n)) for tokens, n in further)
    piece += PROMPTS_CONTINUED * evaluate.continuation_tokens * model.decode_seconds(0)
    running = MACHINE_SECONDS + sum(model.run_seconds(n, evaluate) for n in costed) if costed else 0.0
    windows = (model.native, *(model.claimed,) * (models - 1))
    asked_of = [within_window(evaluate, window) for window in windows] if models > 1 else [evaluate]
    pieces = tuple(piece + _questions_seconds(section, model, chunk) for section in asked_of)
    turns = 2 * COST_ROUNDS if models > 1 else 1
    lengths = ", ".join(f"{length:,}" for length in evaluate.lengths)
    does = f"{models} models on {documents} documents at {lengths} tokens, one pass each"
    if further or needle or ruler:
        does += ", then the use of their context"
    batch_size = evaluate.tasks.batch_size if evaluate.tasks else 1
    tasks, task_seconds = model.tasks, {task.name: model.task_seconds(task, batch_size) for task in model.tasks}
    if tasks:
        count, requests = sum(task.questions for task in tasks), sum(task.requests for task in tasks)
        tokens = sum(task.requests * task.request_bytes for task in tasks) / TOKEN_BYTES
        does += (
            f", then {count:,} questions of {', '.join(task.name for task in tasks)}, each model: about "
            f"{requests:,} requests and {tokens:,.0f} tokens, estimated at {TOKEN_BYTES} bytes a token"
        )
        if slow := [f"{task.name} {duration(task.making)}" for task in tasks if task.making >= TOLD_SECONDS]:
            does += f"; every command first makes all prompts of some, whatever `limit` says: {', '.join(slow)}"
        # The harness keeps the logits of a batch and their log-probabilities, in float32 where the model is.
        longest_bytes = max((task.longest_bytes for task in tasks if task.together is None), default=0)
        rows = batch_size * min(longest_bytes // TOKEN_BYTES, native)
        peak = max(peak, loaded + 8 * rows * spec.vocab_size)
    disk = models * documents * longest * 8 * (1 + len(passes_of(evaluate, native)))
    seconds = sum(pieces) + models * sum(task_seconds.values()) + turns * running + PROOF_SECONDS
    seconds += model.sampling_seconds(sampled_in(recipe, "evaluate"))
    return Cost("evaluate", does, peak, disk, seconds, pieces, task_seconds)


def _questions_seconds(section: Evaluate, model: CostModel, chunk: int) -> float:
    """Of the needle and RULER tests that one model is asked."""
    needle, ruler = section.needle, section.ruler
    texts = (needle.samples * needle.depths if needle else 0) + (ruler.samples if ruler else 0)
    read = (model.seconds(tokens, n, call=min(chunk, n)) for tokens, n in questions_read(section))
    return model.dealt(texts) * sum(read)
