"""From a run's data to the words about it: the verdict, the key numbers, what to watch out for, the tables."""

from __future__ import annotations

from retrofit import format as fmt
from retrofit.evaluation.cache_change import CacheChange, cache_change_of, divided
from retrofit.evaluation.metrics.perplexity import ALL, Row
from retrofit.model.cache_dtype import served_with
from retrofit.report.data import RunData
from retrofit.report.parts import Number, Table
from retrofit.report.sections import context_use, costs, kinds, tasks

OVERFIT = 1.02
"""A last held-out loss this much above the best one is called risen."""


def title_of(run: RunData) -> str:
    """The model's own name, without folders."""
    return run.model.rstrip("/").rsplit("/", 1)[-1] or "the model"


def cache(run: RunData) -> CacheChange | None:
    """How much smaller the KV cache of the whole context length has become, and by what."""
    if run.original is None or run.final is None:
        return None
    return cache_change_of(run.original, run.final, run.claimed_length)


def grew(run: RunData) -> bool:
    """Whether the context length became longer."""
    return bool(run.native_length and run.claimed_length and run.claimed_length > run.native_length)


def verdict(run: RunData) -> str:
    """One sentence: what changed and what it cost."""
    changes = []
    shrunk = cache(run)
    if shrunk and shrunk.smaller:
        parts = f" ({shrunk.parts})" if shrunk.parts else ""
        at = f" at {fmt.count(shrunk.tokens)} tokens" if shrunk.windowed else ""
        changes.append(f"has a {fmt.times(shrunk.ratio)} smaller KV cache{at}{parts}")
    if grew(run):
        changes.append(_length(run))
    changed = " and ".join(changes) if changes else "keeps its KV cache and its context length"
    name = title_of(run)
    if run.final is None and run.original is not None:
        return f"{name} was measured as it is; nothing was changed."
    costs = _costs(run) or "how well it predicts text was not compared"
    sentences = [_used(run), costs, tasks.knowledge(run)]
    return f"{name} {'now ' if changes else ''}{changed}; {'; '.join(filter(None, sentences))}."


def _length(run: RunData) -> str:
    """The new context length; where it was not measured to its end, also how far it was."""
    claimed, native = fmt.count(run.claimed_length), fmt.count(run.native_length)
    if measured_to_the_end(run):
        return f"reads {claimed} tokens instead of {native}"
    return f"is set to read {claimed} tokens instead of {native}, {measured_up_to(run)}"


def measured_to_the_end(run: RunData) -> bool:
    """Whether the longest length measured is the context length."""
    return not run.claimed_length or (run.longest or 0) >= run.claimed_length


def measured_up_to(run: RunData) -> str:
    """How far the context length was measured."""
    return f"measured up to {fmt.count(run.longest)}" if run.longest else "of which nothing was measured"


def _used(run: RunData) -> str:
    """How much of the context length is certified to be used, where that is less than all of it."""
    found = run.final.effective if run.final else None
    if found is None or not run.claimed_length or found.length >= run.claimed_length:
        return ""
    return f"of its context of {fmt.count(run.claimed_length)} tokens, {fmt.count(found.length)} are shown to be used"


def _costs(run: RunData) -> str:
    length = run.head_length
    if length is None:
        return ""
    measured = [kind for kind in run.kinds if kind != ALL]
    found = [(kind, value) for kind in measured if (value := kinds.ratio(run, kind, length)) is not None]
    if not found:
        return ""
    whose = [" the original's"] + [""] * len(found)
    parts = [
        f"{fmt.times(value)}{of} on {kinds.unseen_name(run, kind)}"
        for (kind, value), of in zip(found, whose, strict=False)
    ]
    return f"its perplexity at {fmt.count(length)} tokens is {fmt.enumerated(parts)}"


def key_numbers(run: RunData) -> tuple[Number, ...]:
    """The numbers at the top of the page; those that the run does not have are left out."""
    before, after, numbers = run.original, run.final, []
    if (shrunk := cache(run)) and before and after:
        heads = f"{before.kv_heads} → {after.kv_heads} KV heads, " if before.kv_heads and after.kv_heads else ""
        detail = f"{heads}{fmt.nbytes(shrunk.before)} → {fmt.nbytes(shrunk.after)} at {fmt.count(shrunk.tokens)} tokens"
        detail += f"; {shrunk.parts}" if shrunk.parts else ""
        numbers.append(Number("KV cache", divided(shrunk.ratio) if shrunk.smaller else "unchanged", detail))
    if run.claimed_length:
        detail = f"tokens, was {fmt.count(run.native_length)}" if grew(run) else "tokens, unchanged"
        if grew(run) and not measured_to_the_end(run):
            detail += f"; {measured_up_to(run)}"
        numbers.append(Number("Context length", fmt.count(run.claimed_length), detail))
    if run.head_length and before and after:
        for kind in run.kinds:
            old, new = before.row(kind, run.head_length), after.row(kind, run.head_length)
            if kind != ALL and old and new:
                mark = fmt.read_in(run.seen, kind) if run.seen else ""
                detail = f"{fmt.number(old.ppl)} → {fmt.number(new.ppl)} at {fmt.count(run.head_length)} tokens"
                detail += f"; {'' if mark == fmt.UNSEEN else 'read in '}{mark}" if mark else ""
                numbers.append(Number(f"Perplexity against the original, {kind}", fmt.times(new.ppl / old.ppl), detail))
    numbers += tasks.number(run)
    numbers += context_use.number(run)
    numbers += _beyond(run)
    return (*numbers, *costs.number(run))


def past_native(run: RunData) -> bool:
    """Whether something was measured past the context length the original was made for."""
    return bool(run.native_length and run.lengths and run.lengths[-1] > run.native_length)


def _beyond(run: RunData) -> list[Number]:
    """The final model at the longest length, where that lies past the original's context length."""
    if run.final is None or not run.kinds or not past_native(run):
        return []
    kind, length = (ALL if ALL in run.kinds else run.kinds[0]), run.lengths[-1]
    after = run.final.row(kind, length)
    before = run.original.row(kind, length) if run.original else None
    if after is None:
        return []
    detail = f"the original, past its context: {fmt.number(before.ppl)}" if before else kinds.kind_name(run, kind)
    return [Number(f"Perplexity at {fmt.count(length)} tokens", fmt.number(after.ppl), detail)]


def checks(run: RunData) -> tuple[tuple[str, bool | None], ...]:
    """(what was checked, passed; None when it was not checked) for the line under the verdict."""
    unmet = [one for one in run.gate if not one.passed]
    gate = f"{len(run.gate) - len(unmet)} of {len(run.gate)} requirements met" if run.gate else "no requirements set"
    proof, reload = run.kernel_proof, run.reload
    return (
        (gate, not unmet if run.gate else None),
        ("kernel proven against eager" if proof else "kernel not proven", proof.passed if proof else None),
        (
            f"reloaded in a fresh process with stock transformers: {reload.in_words}" if reload else "not reloaded",
            reload.passed if reload else None,
        ),
    )


def cautions(run: RunData) -> tuple[str, ...]:
    """What to watch out for, from the data alone, then the notes of the steps."""
    sentences = [f"Requirement not met: {one.metric} {one.bound}." for one in run.gate if not one.passed]
    for what, proof in (("The kernel", run.kernel_proof), ("The reloaded checkpoint", run.reload)):
        if proof and not proof.passed:
            sentences.append(f"{what} differs by {fmt.number(proof.max_difference)}, more than the tolerance.")
    if run.final is not None:
        sentences += filter(None, [served_with(run.final.kv_cache_dtype)])
    sentences += kinds.cautions(run)
    if grew(run) and not measured_to_the_end(run):
        claimed = fmt.count(run.claimed_length)
        sentences.append(
            f"The new context length of {claimed} tokens was not measured to its end: {measured_up_to(run)}."
        )
    sentences += tasks.cautions(run)
    sentences += context_use.cautions(run)
    held = [loss for _, _, loss in run.training if loss is not None]
    unchanged = run.recovery is not None and run.recovery.best_step == 0  # which a note says
    if len(held) > 1 and held[-1] > OVERFIT * min(held) and not unchanged:
        sentences.append("The held-out loss rose again before training ended; the best state was kept, not the last.")
    for part in (run.conversion, run.context):
        sentences += part.notes if part else ()
    return tuple(dict.fromkeys([*sentences, *run.notes]))


def comparison(run: RunData, kind: str) -> Table:
    """Perplexity with its 95% interval for each length (rows) and model (columns), and the ratio final / original."""
    models = [model for model in run.models if any(row.kind == kind for row in model.rows)]
    compare = run.original in models and run.final in models
    headers = ["context length", *(model.label for model in models), *(["ratio"] if compare else [])]
    rows = []
    for length in run.lengths:
        past = " (past native)" if run.native_length and length > run.native_length else ""
        cells = [interval_of(model.row(kind, length)) for model in models]
        rows.append(
            (f"{fmt.count(length)}{past}", *cells, *([fmt.times(kinds.ratio(run, kind, length))] if compare else []))
        )
    return Table(tuple(headers), tuple(rows), kinds.kind_name(run, kind), pinned=compare)


def interval_of(row: Row | None) -> str:
    """PrefixPPL [low, high]."""
    return fmt.NONE if row is None else fmt.interval(row.ppl, row.low, row.high)


def details(run: RunData, kind: str) -> Table:
    """Everything else that was measured at each length."""
    headers = ("context length", "model", "tokens", "documents", "tail perplexity", "bits per byte")
    rows = [
        (
            fmt.count(row.length),
            model.label,
            fmt.count(row.tokens),
            fmt.count(row.documents),
            f"{fmt.interval(row.tail_ppl, row.tail_low, row.tail_high)} (last {fmt.count(row.tail)})",
            fmt.number(row.bpb),
        )
        for length in run.lengths
        for model in run.models
        if (row := model.row(kind, length)) is not None
    ]
    units = {row.unit: None for model in run.models for row in model.rows if row.kind == kind and row.unit}
    over = f"; intervals over {' or '.join(units)}" if units else ""
    return Table(headers, tuple(rows), f"{kinds.kind_name(run, kind)}{over}")


def steps(run: RunData) -> Table:
    """Seconds and memory of each step beside what the plan predicted."""
    rows: list[tuple[str, ...]] = [
        (
            step.name,
            fmt.duration(step.seconds),
            fmt.duration(step.predicted_seconds),
            fmt.nbytes(step.peak_bytes),
            fmt.nbytes(step.predicted_peak_bytes),
        )
        for step in run.steps
    ]
    known = [step.seconds for step in run.steps if step.seconds is not None]
    planned = [step.predicted_seconds for step in run.steps if step.predicted_seconds is not None]
    if len(rows) > 1:
        peak = max((step.peak_bytes for step in run.steps if step.peak_bytes), default=None)
        expected = max((step.predicted_peak_bytes for step in run.steps if step.predicted_peak_bytes), default=None)
        total = sum(known) if known else None
        plan = sum(planned) if planned else None
        rows.append(
            (
                "all (time: sum, memory: most)",
                *map(fmt.duration, (total, plan)),
                *map(fmt.nbytes, (peak, expected)),
            )
        )
    return Table(("step", "time", "time predicted", "peak memory", "peak predicted"), tuple(rows))


def layers(run: RunData) -> Table:
    """What the conversion cost in each layer, the costliest first."""
    converted = run.conversion.layers if run.conversion else ()
    found = sorted(converted, key=lambda one: -((one.keys or 0) + (one.values or 0)))
    rows = [
        (
            str(one.index),
            percent(one.keys),
            percent(one.values),
            ", ".join(f"{r.name} {'kept' if r.accepted else 'not kept'}" for r in one.repairs) or fmt.NONE,
            percent(one.repairs[0].held_out_before if one.repairs else None),
            percent(one.repairs[-1].held_out_after if one.repairs else None),
        )
        for one in found
    ]
    headers = ("layer", "keys lost", "values lost", "repairs", "held-out error before repairs", "after")
    return Table(headers, tuple(rows))


def percent(value: float | None) -> str:
    """A share: 12.3%."""
    return fmt.NONE if value is None else f"{value:.1%}"


def requirements(run: RunData) -> Table:
    """What the recipe requires, what was measured, and whether it is met."""
    rows = [
        (
            one.metric,
            one.bound,
            fmt.number(one.value),
            "met" if one.passed else f"NOT MET {one.reason}".strip(),
        )
        for one in run.gate
    ]
    return Table(("measure", "required", "measured", "result"), tuple(rows))
