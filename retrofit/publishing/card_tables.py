"""The tables of a model card as Markdown: quality at each length, tasks, the effective length, the KV cache."""

from __future__ import annotations

from pathlib import PurePath

from retrofit import format as fmt
from retrofit.escape import Markdown, table_row, visible
from retrofit.evaluation.cache_change import divided
from retrofit.evaluation.metrics.effective import EffectiveLength
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.publishing.card_input import CardInput


def kinds_of(card: CardInput) -> list[str]:
    """`all` first; alone when it is all there is."""
    kinds = list(dict.fromkeys(row.kind for row in card.models[-1].rows))
    own = [kind for kind in kinds if kind != ALL]
    return [ALL, *own] if ALL in kinds and len(own) > 1 else own or kinds


def name_of(kind: str) -> str:
    """A kind of text or a task as a reader knows it: a path of somebody's machine becomes its last part."""
    return visible(kind if kind.startswith("hub:") else PurePath(kind).name or kind)


def quality_table(card: CardInput, kind: str) -> list[Markdown]:
    """A Markdown table, one row a length: value (low to high) for each model, and last against first."""
    labels = [model.label for model in card.models]
    compared = len(labels) > 1
    header = ["context (tokens)", *labels, *([f"{labels[-1]} / {labels[0]}"] if compared else [])]
    lines = [table_row(header), Markdown("|---:" * len(header) + "|")]
    lengths = sorted({row.length for row in card.models[-1].rows if row.kind == kind})
    for length in lengths:
        rows = [next(r for r in m.rows if r.kind == kind and r.length == length) for m in card.models]
        beyond = " (beyond native)" if length > card.native_length else ""
        cells = [f"{length:,}{beyond}"]
        cells += [f"{_ppl(row.ppl)} ({_ppl(row.low)} to {_ppl(row.high)})" for row in rows]
        if compared:
            cells.append(f"{rows[-1].ppl / rows[0].ppl:.2f}")
        lines.append(table_row(cells))
    return lines


def mark_of(card: CardInput, kind: str) -> str:
    """What a kind of text was read for, as it stands after its name; empty for all together, and where no step read."""
    mark = fmt.read_in(card.seen, kind)
    if mark == fmt.NONE:
        return ""
    if mark == fmt.UNSEEN:
        return "(unseen: no step read text of this kind)"
    return f"(other documents of it were read in {mark})"


def frequency_table(card: CardInput) -> list[Markdown]:
    """What the last model lost as a Markdown table: a row a kind of text, a column a band of token ranks."""
    bands = card.models[-1].by_frequency
    if not bands:
        return []
    columns = list(dict.fromkeys((band.first, band.last) for band in bands))
    marked = ["read in"] if card.seen else []
    header = ["text", *marked, *("all tokens" if c == columns[0] else f"rank {fmt.ranks(*c)}" for c in columns)]
    lines = [table_row(header), Markdown("|---|" + "---|" * len(marked) + "---:|" * len(columns))]
    for kind in kinds_of(card):
        found = {(band.first, band.last): band for band in bands if band.kind == kind}
        cells = ["all text" if kind == ALL else name_of(kind), *([fmt.read_in(card.seen, kind)] if marked else [])]
        for column in columns:
            band = found.get(column)
            cells.append(f"{band.ratio:.2f} ({band.low:.2f} to {band.high:.2f})" if band else fmt.NONE)
        lines.append(table_row(cells))
    return lines


def _ppl(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def gguf_table(card: CardInput) -> list[Markdown]:
    """GGUF files as a Markdown table: size, perplexity of the same tokens, how far a token's loss is, and how often the
    most probable token is the same."""
    if card.gguf is None:
        return []
    far = "difference of a token's loss, mean (largest)"
    header = ["file", "size", "perplexity", "/ this folder's", far, "same next token"]
    lines = [table_row(header), Markdown("|---|---:|---:|---:|---:|---:|")]
    for file in card.gguf.files:
        far = f"{file.distance.token:.2g} ({file.distance.largest:.2g})"
        cells = [file.name, fmt.nbytes(file.nbytes), _ppl(file.ppl), f"{file.ratio:.4f}", far]
        lines.append(table_row([*cells, f"{file.distance.greedy:.1%}"]))
    return lines


def task_table(card: CardInput) -> list[Markdown]:
    """Scores in tasks as a Markdown table, one row a metric; the last column pairs the last model with the first."""
    last = card.models[-1]
    if not last.tasks:
        return []
    labels = [model.label for model in card.models]
    compared = [f"{labels[-1]} - {labels[0]}"] if len(labels) > 1 else []
    header = ["task", "metric", "questions", "examples", *labels, *compared]
    lines = [table_row(header), Markdown("|---|---|" + "---:|" * (len(header) - 2))]
    for score in last.tasks:
        place = (score.task, score.metric)
        cells = [score.task, score.metric, f"{score.questions:,}", str(score.fewshot)]
        for model in card.models:
            one = next((one for one in model.tasks if (one.task, one.metric) == place), None)
            missing = model.not_asked.get(score.task, 0)
            if one is None:
                cells.append("not asked, its context is shorter" if missing else "–")
                continue
            value = f"{one.value:.4g}" if one.stderr is None else f"{one.value:.4g} ± {one.stderr:.2g}"
            cells.append(f"{value} (without {missing:,} that its context does not hold)" if missing else value)
        if score.chance is not None:
            cells[1] += f" (chance {score.chance:.4g})"
        if compared:
            change = next((one for one in last.task_changes if (one.task, one.metric) == place), None)
            cells.append(f"{change.change:+.3f} ({change.low:+.3f} to {change.high:+.3f})" if change else "–")
        lines.append(table_row(cells))
    return lines


def certificate_table(effective: EffectiveLength) -> list[Markdown]:
    """The certificate as a table: every length, every test, what it needed."""

    def cell(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    lines = [
        table_row(
            (
                "context length",
                "passed",
                "tail, times the perplexity",
                "context gain, nats a token",
                "needle (needed)",
            )
        ),
        Markdown("|---:|:---:|---:|---:|---:|"),
    ]
    for test in effective.tests:
        needle = "–" if test.needle is None else f"{test.needle:.2f}"
        needed = "" if test.needle_bound is None else f" ({test.needle_bound:.2f})"
        cells = (
            f"{test.length:,}",
            "yes" if test.passed else "no",
            cell(test.tail, test.tail_low, test.tail_high),
            cell(test.gain, test.gain_low, test.gain_high, "+"),
            needle + needed,
        )
        lines.append(table_row(cells))
    return lines


def cache_table(card: CardInput) -> list[Markdown]:
    """Bytes before and after at every length, and how many times smaller they became."""
    lines = [table_row(("context (tokens)", "before", "after", "smaller")), Markdown("|---:|---:|---:|---:|")]
    for tokens, (before, after) in sorted(card.kv_cache_bytes.items()):
        lines.append(table_row((f"{tokens:,}", fmt.nbytes(before), fmt.nbytes(after), divided(before / after))))
    return lines
