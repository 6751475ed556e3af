"""Writes `report.html` (one file, nothing fetched), `report.md` and the chart of the model card.

Names in them are foreign: whatever a template writes is escaped, for HTML by jinja, for Markdown by `escape.prose`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit import escape
from retrofit import format as fmt
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.evaluation.result import ModelEvaluation
from retrofit.report.charts.figures import card_picture, figures
from retrofit.report.data import RunData, StepRecord, Training
from retrofit.report.glossary import definitions
from retrofit.report.parts import Figure, Table
from retrofit.report.sections import continuations, encodings, kinds, summary
from retrofit.windows import sentences

if TYPE_CHECKING:
    from markupsafe import Markup

    from retrofit.kernels.check import KernelCheck
    from retrofit.publishing.reload import ReloadReport

__all__ = [
    "ModelEvaluation",
    "RunData",
    "StepRecord",
    "files",
    "html",
    "markdown",
    "render",
]

TEMPLATES = Path(__file__).parent / "templates"
CARD_CHART = "perplexity"
SECTIONS = {
    "quality": "How well it predicts text",
    "tasks": "How it answers questions",
    "context": "Whether the long context is used",
    "search": "How the position encoding was chosen",
    "training": "Recovery training",
    "cost": "What it costs to run",
    "conversion": "Inside the conversion",
}


def render(run: RunData, folder: str | Path) -> tuple[Path, ...]:
    """Write the `files` of a report into `folder` and return their paths. Each file is whole or not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = files(run)
    for name, content in made.items():
        part = folder / f".{name}.partial"
        part.write_bytes(content)
        part.replace(folder / name)
    return tuple(folder / name for name in reversed(made))


def files(run: RunData) -> dict[str, bytes]:
    """The report of a run by file name: report.html, report.md and, where perplexities were measured, perplexity.svg
    and perplexity.png (for the card)."""
    made: dict[str, bytes] = {}
    picture = card_picture(run)
    if picture is not None:
        made[f"{CARD_CHART}.svg"] = picture.svg.encode()
        made[f"{CARD_CHART}.png"] = picture.png
    shown = figures(run)
    made["report.md"] = markdown(run, shown).encode()
    made["report.html"] = html(run, shown).encode()
    return made


def html(run: RunData, shown: tuple[Figure, ...] | None = None) -> str:
    """The report as one HTML page. shown: its figures, when they are drawn already."""
    return _template("report.html.j2", autoescape=True, finalize=_visible).render(
        **_content(run, figures(run) if shown is None else shown)
    )


def markdown(run: RunData, shown: tuple[Figure, ...] | None = None) -> str:
    """The report as Markdown, with tables where the page has charts; those of perplexity stand in it already."""
    drawn = figures(run) if shown is None else shown
    kept = tuple(one for one in drawn if one.section != "quality" or one.picture is None)
    return _template("report.md.j2", autoescape=False, finalize=escape.prose).render(**_content(run, kept))


def _content(run: RunData, shown: tuple[Figure, ...]) -> dict[str, Any]:
    return {
        "run": run,
        "title": f"{summary.title_of(run)}: {run.name}",
        "passages": continuations.passages(run),
        "about_passages": continuations.about(run),
        "verdict": summary.verdict(run),
        "numbers": summary.key_numbers(run),
        "checks": summary.checks(run),
        "cautions": summary.cautions(run),
        "comparisons": [summary.comparison(run, kind) for kind in run.kinds],
        "details": [summary.details(run, kind) for kind in run.kinds if kind != ALL or len(run.kinds) == 1],
        "sections": [(name, [one for one in shown if one.section == key]) for key, name in SECTIONS.items()],
        "about_marks": kinds.about_marks(run),
        "past_native": summary.past_native(run),
        "has_chart": bool(run.kinds),
        "gate": summary.requirements(run),
        "steps": summary.steps(run),
        "proof": _proof(run.kernel_proof),
        "reload": _reload(run.reload),
        "definitions": definitions(run),
        "changes": _changes(run),
    }


def _changes(run: RunData) -> tuple[tuple[str, str], ...]:
    """(what, how) of every step that changed the model."""
    rows = []
    if done := run.conversion:
        calibration = f", calibrated on {fmt.count(done.tokens)} tokens" if done.tokens else ""
        by_kind = ", ".join(f"{kind} {fmt.count(n)}" for kind, n in done.tokens_by_kind.items())
        how = f"{done.kv_heads_before} → {done.kv_heads_after} KV heads in every layer by method `{done.method}`"
        rows.append(("KV heads", f"{how}{calibration}{f' ({by_kind})' if by_kind else ''}"))
    if run.windows:
        parts = (part(run.windows) for part in (sentences.layers, sentences.sinks, sentences.losses))
        rows.append(("Sliding windows", "; ".join(parts)))
    if longer := run.context:
        how = f"{fmt.count(longer.before)} → {fmt.count(longer.length)} tokens by `{longer.method}`"
        rows.append(("Context length", f"{how}, factor {fmt.plain(longer.factor)}"))
    if encodings.search_of(run):
        rows.append(("Position encoding", encodings.described(run)))
    if run.recovery:
        rows.append(("Recovery", _recovery(run.recovery)))
    if run.kernel:
        rows.append(("Attention kernel", run.kernel))
    return tuple(rows)


def _recovery(training: Training) -> str:
    """How the training went, in numbers."""
    rate, speed = training.learning_rate, training.tokens_per_second
    parts = [
        f"loss `{training.loss}` on {fmt.count(training.tokens)} tokens in {fmt.count(training.steps)} steps",
        f"LoRA rank {fmt.count(training.rank)}",
        f"learning rate {rate:.2g}" if rate else "",
        f"{fmt.count(speed)} tokens/s" if speed else "",
        _kept(training),
        _passages(training),
    ]
    return ", ".join(filter(None, parts))


def _kept(training: Training) -> str:
    """Which weights of the training are the model's, where they are not the last."""
    if training.best_step == training.steps:
        return ""
    if training.best_step == 0:
        return "no step was better on held-out text, and the weights from before it are kept"
    return f"the weights after step {fmt.count(training.best_step)} are kept, the best on held-out text"


def _passages(training: Training) -> str:
    """What the training did to passages out of the windows' sight."""
    if training.passages is None:
        return ""
    before, after = training.passages
    return f"loss of passages out of sight {fmt.number(before)} → {fmt.number(after)}"


def _proof(proof: KernelCheck | None) -> str:
    if proof is None:
        return ""
    return (
        f"Kernel `{proof.kernel}` against `{proof.reference}` on {fmt.count(proof.tokens)} tokens: the logits differ "
        f"by at most {fmt.number(proof.max_difference)}, {'within' if proof.passed else 'MORE THAN'} the tolerance of "
        f"{fmt.plain(proof.tolerance)} (rounding alone moves those of `{proof.reference}` by "
        f"{fmt.number(proof.rounding)}).{f' It computes {proof.tiles}.' if proof.tiles else ''}"
    )


def _reload(report: ReloadReport | None) -> str:
    if report is None:
        return ""
    return (
        "A fresh process with stock transformers, without this package, loaded the written checkpoint and scored the "
        f"same tokens again: losses differ by at most {fmt.number(report.max_difference)} (mean "
        f"{fmt.number(report.mean_difference)}), {'within' if report.passed else 'MORE THAN'} the tolerance of "
        f"{fmt.plain(report.tolerance_token)} for a token and of {fmt.plain(report.tolerance_mean)} for the mean of "
        "1,024."
    )


def _template(name: str, *, autoescape: bool, finalize: Callable[[Any], Any]) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "prose": _prose,
        "split": _split,
        "row": escape.table_row,
        "bold": escape.bold,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
        "table": _table,
        "fenced": escape.code_block,
    }
    return environment.get_template(name)


def _table(data: Table) -> escape.Markdown:
    """A table with its first column to the left, the others to the right."""
    lines = [escape.table_row(data.headers), "| --- |" + " ---: |" * (len(data.headers) - 1)]
    return escape.Markdown("\n".join([*lines, *map(escape.table_row, data.rows)]) + "\n")


def _visible(value: Any) -> Any:
    """A text of the page with control characters as escapes; other values, and what is HTML already, as they are."""
    return escape.visible(value, keep="\n\t") if type(value) is str else value


def _prose(text: str) -> Markup:
    """Escaped text with `names` set as code."""
    from markupsafe import Markup
    from markupsafe import escape as escape_html

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape_html(_visible(text)))))


def _split(text: str) -> tuple[str, str]:
    """A cell's value and what stands in brackets after it, which narrow screens set below."""
    found = re.fullmatch(r"(\S+) ([\[(].*)", text)
    return (found[1], found[2]) if found else (text, "")
