"""What was measured as people and machines read it: `evaluate` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retrofit.console import Console
from retrofit.evaluation.metrics.effective import certificate
from retrofit.format import duration, nbytes

if TYPE_CHECKING:
    from retrofit.evaluation.cost import RunCost
    from retrofit.evaluation.metrics.context_use import LongContext
    from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
    from retrofit.workflow.compare import Comparison
    from retrofit.workflow.single import Evaluation


def evaluation(console: Console, result: Evaluation) -> None:
    """`retrofit evaluate`."""
    console.result(result)
    console.table(
        f"{result.model}: perplexity, {result.dtype}, kernel {result.kernel}",
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
    if result.rows:
        unit, tail = result.rows[0].unit, max(row.tail for row in result.rows)
        console.say(f"intervals: bootstrap over each {unit}; tail ppl: the last {tail:,} tokens before the length")
    console.say(f"KV cache: {nbytes(result.kv_bytes_per_token)} per token, {result.kv_heads} KV heads")
    if result.cost:
        _cost(console, result.cost)
    tasks(console, result.tasks)
    if result.losses:
        console.say(f"token losses: {result.losses}")
    _long_context(console, result.long_context)


def tasks(console: Console, rows: Sequence[TaskScore]) -> None:
    """What one model scored in tasks."""
    if rows:
        console.table(
            "Tasks of lm-evaluation-harness",
            ["task", "metric", "score", "standard error", "questions", "examples"],
            [
                (
                    row.task,
                    row.metric,
                    f"{row.value:.4f}",
                    "-" if row.stderr is None else f"{row.stderr:.4f}",
                    row.questions,
                    row.fewshot,
                )
                for row in rows
            ],
        )


def task_changes(console: Console, title: str, names: tuple[str, str], rows: Sequence[TaskChange]) -> None:
    """Two models on the same questions. names: of the two, as the columns are called."""
    if rows:
        console.table(
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


def _cost(console: Console, found: RunCost) -> None:
    """What one sequence costs, beside the most that the machine could do."""
    console.table(
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


def _long_context(console: Console, found: LongContext) -> None:
    """What was asked for beyond the plain pass."""
    for note in found.notes:
        console.say(f"note: {note}")
    if found.defined:
        console.table(
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
        console.table(
            f"Context gain: nats that context beyond {found.native:,} tokens saves on the same tokens",
            ["text", "length", "gain", "95% interval", "tokens"],
            [
                (r.kind, r.length, f"{r.gain:+.4f}", f"{r.low:+.4f} to {r.high:+.4f}", r.tokens)
                for r in found.context_gain
            ],
        )
    if found.long_ppl:
        console.table(
            "LongPPL: perplexity of the tokens that need long context",
            ["text", "length", "ppl", "key tokens", "tokens"],
            [(r.kind, r.length, f"{r.ppl:.3f}" if r.ppl else "-", r.key_tokens, r.tokens) for r in found.long_ppl],
        )
    if found.needle:
        together = found.needle.together and len(found.needle.depths) > 1
        counts = "preferred to every other needle's answer" if together else "answered exactly"
        console.table(
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
        console.table(
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
    if found.effective:
        console.say(
            f"effective length: {found.effective.length:,} of {found.effective.tests[-1].length:,} tokens measured"
        )
        console.say(f"  {certificate(found.effective)}")


def comparison(console: Console, result: Comparison) -> None:
    """`retrofit compare`."""
    console.result(result)
    console.say(f"a: {result.a}, {result.read[0]}\nb: {result.b}, {result.read[1]}")
    for note in result.notes:
        console.say(f"note: {note}")
    task_changes(console, "Tasks: b - a on the same questions, right answers of only one", ("a", "b"), result.tasks)
    if result.bits:
        console.table(
            "Bits per byte on the same bytes, and b / a with its paired 95% interval",
            ["text", "bytes", "a", "b", "b / a", "interval"],
            [
                (row.kind, row.nbytes, f"{row.bpb_a:.4f}", f"{row.bpb_b:.4f}", f"{row.ratio:.4f}", _interval(row))
                for row in result.bits
            ],
        )
        return
    console.table(
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


def _interval(row: Any) -> str:
    return f"{row.low:.4f} to {row.high:.4f}"
