"""What was measured as tables and lines: `evaluate` and `compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrofit.evaluation.cache_change import cache_change_of, divided
from retrofit.format import duration, nbytes, none_unseen, ranks, read_in
from retrofit.model.cache_dtype import served_with
from retrofit.tables import NOTE, Part, Table

if TYPE_CHECKING:
    from retrofit.evaluation.compare import Comparison
    from retrofit.evaluation.metrics.context_use import LongContext
    from retrofit.evaluation.result import ModelEvaluation
    from retrofit.evaluation.running import RunCost
    from retrofit.evaluation.tasks.answers import TaskChange, TaskScore


def marked(table: Table, seen: Mapping[str, Sequence[str]] | Callable[[str], str]) -> Table:
    """The table, whose first column names kinds of text, with a second one that says what text of each was read for;
    as it is where no step read any. seen: as `ModelEvaluation.seen` has it, or what stands in the second column."""
    if not seen:
        return table
    mark = seen if callable(seen) else lambda kind: read_in(seen, kind)
    rows = [(row[0], mark(str(row[0])), *row[1:]) for row in table.rows]
    return Table(table.title, [table.columns[0], "read in", *table.columns[1:]], rows)


def evaluation(result: ModelEvaluation) -> Iterator[Part]:
    """`retrofit evaluate`."""
    perplexities = Table(
        f"{result.label}: perplexity, {result.dtype}, kernel {result.kernel}",
        ["text", "length", "ppl", "95% interval", "tail ppl", "bits/byte", "tokens", "texts"],
        [
            (
                row.kind,
                row.length,
                f"{row.ppl:.3f}",
                f"{row.low:.2f}-{row.high:.2f}",
                f"{row.tail_ppl:.3f}",
                f"{row.bpb:.4f}" if row.bpb is not None else "-",
                row.tokens,
                row.documents,
            )
            for row in result.rows
        ],
    )
    yield marked(perplexities, result.seen)
    if alike := none_unseen(result.seen):
        yield alike
    if result.rows:
        unit, tail = result.rows[0].unit, max(row.tail for row in result.rows)
        yield f"intervals: bootstrap over each {unit}; tail ppl: the last {tail:,} tokens before the length"
    sizes = ", ".join(f"{nbytes(size)} at {tokens:,}" for tokens, size in sorted(result.kv_cache_bytes.items()))
    each = f"KV cache: {nbytes(result.kv_bytes_per_token)} for each of the first tokens, {result.kv_heads} KV heads"
    yield f"{each}; {sizes} tokens" if sizes else each
    if stored := served_with(result.kv_cache_dtype):
        yield stored
    if result.cost:
        yield from _cost(result.cost)
    yield from tasks(result.tasks)
    for name, count in result.not_asked.items():
        yield f"task {name}: {count:,} questions not asked, their prompts are longer than the context"
    if result.losses:
        yield f"token losses: {result.losses}"
    if result.long_context:
        yield from _long_context(result.long_context, result.seen)


def tasks(rows: Sequence[TaskScore]) -> Iterator[Part]:
    """What one model scored in tasks."""
    if rows:
        yield Table(
            "Tasks",
            ["task", "metric", "score", "standard error", "chance", "questions", "examples"],
            [
                (
                    row.task,
                    row.metric,
                    f"{row.value:.4f}",
                    "-" if row.stderr is None else f"{row.stderr:.4f}",
                    "-" if row.chance is None else f"{row.chance:.2f}",
                    row.questions,
                    row.fewshot,
                )
                for row in rows
            ],
        )
    for row in rows:
        if row.by_chance:
            yield f"{row.task}, {row.metric}: not distinguishable from chance"


def task_changes(title: str, names: tuple[str, str], rows: Sequence[TaskChange]) -> Iterator[Part]:
    """Two models on the same questions. names: of the two, as the columns are called."""
    if rows:
        yield Table(
            title,
            ["task", "metric", *names, "difference", "95% interval", f"only {names[0]}", f"only {names[1]}", "p"],
            [
                (
                    row.task,
                    row.metric,
                    f"{row.before:.4f}",
                    f"{row.after:.4f}",
                    f"{row.change:+.4f}",
                    f"{row.low:+.4f} to {row.high:+.4f}",
                    "-" if row.lost is None else row.lost,
                    "-" if row.gained is None else row.gained,
                    "-" if row.p is None else f"{row.p:.2g}",
                )
                for row in rows
            ],
        )


def cache_sizes(models: Mapping[str, ModelEvaluation]) -> Iterator[Part]:
    """The KV cache of the first and the last model at every length, and what made it smaller."""
    if len(models) < 2:
        return
    (first, before), *_, (last, after) = models.items()
    change = cache_change_of(before, after, after.claimed_length)
    if change is None:
        return
    rows = [
        (tokens, nbytes(size), nbytes(after.kv_cache_bytes[tokens]), divided(size / after.kv_cache_bytes[tokens]))
        for tokens, size in sorted(before.kv_cache_bytes.items())
        if tokens in after.kv_cache_bytes
    ]
    yield Table("KV cache of one sequence", ["tokens", first, last, "smaller"], rows)
    if change.parts:
        yield f"KV cache {divided(change.ratio)} at {change.tokens:,} tokens: {change.parts}"


def _cost(found: RunCost) -> Iterator[Part]:
    """What one sequence costs, beside the most that the machine could do."""
    yield Table(
        f"Cost of one sequence, {found.dtype}, kernel {found.kernel}; in brackets what memory bandwidth and "
        "floating-point speed allow",
        ["tokens", "KV cache", "first token", "prefill tokens/s", "decode tokens/s", "prefill memory"],
        [
            (
                one.length,
                nbytes(one.kv_bytes),
                duration(one.prefill_seconds),
                f"{one.prefill_per_s:,.0f} [{one.prefill_bound:,.0f}]",
                f"{one.decode_per_s:.1f} [{one.decode_bound:.1f}]" if one.decode_per_s else "-",
                nbytes(one.prefill_bytes),
            )
            for one in found.lengths
        ],
    )
    rows = [(one.length, together) for one in found.lengths for together in one.batches]
    if rows:
        yield Table(
            "Sequences decoded together, cache of fixed size; tokens/s of all, in brackets what bandwidth allows",
            ["tokens", "sequences", "KV cache", "launched from Python", "as a CUDA graph", "note"],
            [
                (
                    length,
                    one.batch,
                    nbytes(one.kv_bytes),
                    "-" if one.loop_per_s is None else f"{one.loop_per_s:,.1f} [{one.decode_bound:,.0f}]",
                    "-" if one.graph_per_s is None else f"{one.graph_per_s:,.1f} [{one.decode_bound:,.0f}]",
                    one.note or "-",
                )
                for length, one in rows
            ],
        )


def _long_context(found: LongContext, seen: Mapping[str, Sequence[str]]) -> Iterator[Part]:
    """What was asked for beyond the plain pass. seen: as `ModelEvaluation.seen` has it."""
    for note in found.notes:
        yield f"{NOTE}{note}"
    if found.defined:
        yield Table(
            "Perplexity as others define it",
            ["definition", "length", "stride", "ppl", "bits/byte", "tokens", "read"],
            [
                (
                    row.definition,
                    row.length,
                    row.stride or "-",
                    f"{row.ppl:.4f}",
                    f"{row.bits_per_byte:.4f}" if row.bits_per_byte is not None else "-",
                    row.tokens,
                    row.read,
                )
                for row in found.defined
            ],
        )
    if found.context_gain:
        gains = Table(
            "Context gain: nats that all of the context saves on the same tokens, against less of it",
            ["text", "length", "against", "gain", "95% interval", "tokens"],
            [
                (r.kind, r.length, r.context, f"{r.gain:+.4f}", f"{r.low:+.4f} to {r.high:+.4f}", r.tokens)
                for r in found.context_gain
            ],
        )
        yield marked(gains, seen)
    if found.long_ppl:
        keyed = Table(
            "LongPPL: perplexity of the tokens that need long context",
            ["text", "length", "ppl", "key tokens", "tokens"],
            [(r.kind, r.length, f"{r.ppl:.3f}" if r.ppl else "-", r.key_tokens, r.tokens) for r in found.long_ppl],
        )
        yield marked(keyed, seen)
    if found.needle:
        multi_key = found.needle.multi_key and len(found.needle.depths) > 1
        counts = "preferred to every other needle's answer" if multi_key else "answered exactly"
        yield Table(
            f"{found.needle.test}, found: {counts}; loss in nats per token, margin over a wrong answer",
            ["length", "depth", "at token", "found", "exact match", "loss", "margin", "answer"],
            [
                (
                    cell.length,
                    f"{cell.depth:.2f}",
                    cell.position,
                    "yes" if cell.found else "no",
                    "yes" if cell.answer.starts else "no",
                    f"{cell.answer.loss:.2f}",
                    f"{cell.answer.margin:+.2f}",
                    cell.answer.answered,
                )
                for cell in found.needle.cells
            ],
        )
    if found.ruler:
        yield Table(
            "RULER tasks: share of the answers in the text generated, loss in nats per token",
            ["task", "length", "recall", "loss", "margin", "preferred", "questions"],
            [
                (
                    r.task,
                    r.length,
                    f"{r.recall:.2f}",
                    f"{r.loss:.2f}",
                    f"{r.margin:+.2f}",
                    f"{r.preferred:.2f}",
                    r.questions,
                )
                for r in found.ruler.rows
            ],
        )
    if found.not_asked:
        yield f"not asked at {', '.join(f'{n:,}' for n in found.not_asked)} tokens: the context is shorter"
    if found.effective:
        from retrofit.evaluation.metrics.effective import certificate

        yield (f"effective length: {found.effective.length:,} of {found.effective.tests[-1].length:,} tokens measured")
        yield f"  {certificate(found.effective)}"


def comparison(result: Comparison) -> Iterator[Part]:
    """`retrofit compare`."""
    yield f"a: {result.a}, {result.read[0]}\nb: {result.b}, {result.read[1]}"
    for note in result.notes:
        yield f"{NOTE}{note}"
    yield from task_changes("Tasks: b - a on the same questions, right answers of only one", ("a", "b"), result.tasks)
    mark = _mark(*result.seen)
    if result.bits:
        bits = Table(
            "Bits per byte on the same bytes, and b / a with its paired 95% interval",
            ["text", "bytes", "a", "b", "b / a", "interval"],
            [
                (row.kind, row.nbytes, f"{row.bpb_a:.4f}", f"{row.bpb_b:.4f}", f"{row.ratio:.4f}", _interval(row))
                for row in result.bits
            ],
        )
        yield marked(bits, mark)
        return
    perplexities = Table(
        "Perplexity, and b / a with its paired 95% interval",
        ["text", "length", "a", "b", "b / a", "interval"],
        [
            (
                row.kind,
                row.length,
                f"{row.ppl_a:.3f}",
                f"{row.ppl_b:.3f}",
                f"{row.ratio:.4f}",
                _interval(row),
            )
            for row in result.rows
        ],
    )
    yield marked(perplexities, mark)
    yield from _bands(result, mark)
    for alike in dict.fromkeys(none_unseen(seen) for seen in result.seen):
        if alike:
            yield alike


def _bands(result: Comparison, mark: Mapping[str, Sequence[str]] | Callable[[str], str]) -> Iterator[Part]:
    """Perplexities by how frequent a token is; the band of all tokens stands in the table before."""
    rows = [row for row in result.bands if not row.every]
    if rows:
        bands = Table(
            f"The same at {rows[0].length:,} tokens, by rank of the token in the text (1: the most frequent)",
            ["text", "rank", "tokens", "a", "b", "b / a", "interval"],
            [
                (
                    row.kind,
                    ranks(row.first, row.last),
                    row.tokens,
                    f"{row.before:.3f}",
                    f"{row.after:.3f}",
                    f"{row.ratio:.4f}",
                    _interval(row),
                )
                for row in rows
            ],
        )
        yield marked(bands, mark)


def _mark(
    a: Mapping[str, Sequence[str]], b: Mapping[str, Sequence[str]]
) -> Mapping[str, Sequence[str]] | Callable[[str], str]:
    """What text of a kind was read for by what made two models; by name of the model where both say something else."""
    if not a or not b or a == b:
        return a or b

    def both(kind: str) -> str:
        one, other = read_in(a, kind), read_in(b, kind)
        return one if one == other else f"a: {one}; b: {other}"

    return both


def _interval(row: Any) -> str:
    return f"{row.low:.4f} to {row.high:.4f}"
