"""Results as tables and lines, for a terminal and a notebook: one function per command; `measured` has the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrofit.escape import python_string
from retrofit.format import duration, heads, kv_per_token, nbytes, none_unseen
from retrofit.model.cache_dtype import served_with
from retrofit.model.inspect import ranges
from retrofit.tables import NOTE, Part, Table
from retrofit.views import windows
from retrofit.views.measured import cache_sizes, marked, task_changes

if TYPE_CHECKING:
    from retrofit.catalogue import RecipeEntry
    from retrofit.evaluation.result import ModelEvaluation
    from retrofit.kv_heads.sweep.price_list import PriceList
    from retrofit.model.inspect import Inspection, Undescribed
    from retrofit.system.doctor import Health
    from retrofit.workflow.command import Written
    from retrofit.workflow.plan import Plan
    from retrofit.workflow.run import RunResult


def run(result: RunResult) -> Iterator[Part]:
    """`retrofit run`."""
    from retrofit.evaluation.tasks.common_knowledge import sentence

    labels = list(result.models)
    yield from by_length(result.models)
    for last in list(result.models.values())[-1:]:
        title = f"Tasks: {last.label} - {labels[0]} on the same questions, right answers of only one"
        yield from task_changes(title, (labels[0], last.label), last.task_changes)
        for model in result.models.values():
            for name, count in model.not_asked.items():
                yield f"{model.label} was not asked {count:,} questions of {name}: its context is shorter"
        knowledge = sentence(next(iter(result.models.values())).tasks, last.tasks, last.task_changes)
        if knowledge and last.task_changes:
            yield f"general knowledge: {knowledge}"
    yield from cache_sizes(result.models)
    if result.gate:
        yield Table(
            "Requirements",
            ["metric", "required", "met", "measured"],
            [
                (one.metric, one.bound, one.passed, one.reason if one.value is None else f"{one.value:.6g}")
                for one in result.gate
            ],
        )
    yield f"\nreport: {result.report}"
    if result.final:
        reloaded = f"; loaded again in a fresh process: {result.reload.in_words}" if result.reload else ""
        yield f"checkpoint: {result.final}{reloaded}"
    if result.refused:
        yield f"checkpoint, not published because a requirement is not met: {result.refused}"


def plan(result: Plan) -> Iterator[Part]:
    """`retrofit plan`, and `run --dry-run`."""
    from retrofit.workflow.plan import describe_plan

    lacking = result.lacking
    rows = [
        (cost.step, cost.does, nbytes(cost.peak_bytes), nbytes(cost.disk_bytes), duration(cost.seconds))
        + ((f"no: {lacking[cost.step]}" if lacking[cost.step] else "yes",) if lacking else ())
        for cost in result.steps
    ]
    total: tuple[str, ...]
    total = ("all", "", nbytes(result.peak_bytes), nbytes(result.disk_bytes), duration(result.seconds))
    total += ("no" if any(lacking.values()) else "yes",) if lacking else ()
    title = f"{result.recipe} on {result.model} (estimated)"
    yield Table(title, ["step", "what", "memory", "disk", "time", *(["fits"] if lacking else [])], [*rows, total])
    yield from describe_plan(result)


def prices(result: PriceList) -> Iterator[Part]:
    """`retrofit plan --kv-heads`."""
    at = f"{result.length // 1024}k" if result.length % 1024 == 0 else f"{result.length:,}"
    columns = [
        "KV heads",
        "KV cache a token",
        f"at {at}",
        "loss (nats/token)",
        "perplexity",
        "",
        "layers that pay most",
    ]
    rows = []
    for price in result.prices:
        worst_layers = ", ".join(f"{layer} ({share:.0%})" for layer, share in price.worst_layers())
        rows.append(
            (
                price.kv_heads,
                nbytes(price.kv_bytes_per_token),
                nbytes(price.kv_cache_bytes),
                "-" if price.increase is None else f"{price.increase:+.3f}{'' if price.significant else ' ~'}",
                "-" if price.ratio is None else f"x {price.ratio:,.2f}",
                price.how,
                worst_layers or "-",
            )
        )
    yield Table(f"{result.model}: what fewer KV heads cost", columns, rows)
    if not all(price.significant for price in result.prices):
        yield "~: below two standard errors, not to be told from zero on the text that was scored"
    if result.calibrated:
        yield from _how_calibrated(result)
    for note in result.notes:
        yield f"{NOTE}{note}"
    if result.budget and result.kv_heads:
        size = next(price.kv_cache_bytes for price in result.prices if price.kv_heads == result.kv_heads)
        yield (
            f"\n{heads(result.kv_heads)} {'fits' if result.kv_heads == 1 else 'fit'} {nbytes(result.budget.nbytes)} at "
            f"{result.budget.length:,} tokens "
            f"({nbytes(size)}):\n  {result.command}"
        )


def _how_calibrated(result: PriceList) -> list[str]:
    measured, curve = result.calibrated, result.curve
    assert measured
    repair = "the merge and the closed-form repair" if measured.repair != "none" else "the merge alone"
    probes = ", ".join(f"{heads(p.kv_heads)} {p.increase:+.3f} (standard error {p.error:.3f})" for p in measured.probes)
    lines = [
        f"measured: {probes}, converted on {measured.tokens:,} tokens of {', '.join(measured.kinds)} and scored on "
        f"{measured.scored_tokens:,} others (original {measured.original_loss:.3f} nats/token)",
        f"these are losses after {repair}, as `retrofit convert` writes it, before any recovery; a conversion on more "
        "text loses less",
    ]
    if curve is None:
        return [*lines, "no probe lost anything that was measurable: nothing is predicted"]
    through = "both points" if len(curve.points) > 1 else f"{heads(curve.points[0])} (exponent 1 assumed)"
    return [*lines, f"predicted: loss = {math.exp(curve.log_scale):.3g} cost^{curve.exponent:.2f}, through {through}"]


def inspection(result: Inspection | Undescribed) -> Iterator[Part]:
    """`retrofit inspect`."""
    from retrofit.model.inspect import Inspection

    if isinstance(result, Inspection):
        yield from _described(result)
    else:
        yield f"{result.model}: {result.reason}"
    yield from _positions(result, isinstance(result, Inspection))


def _described(result: Inspection) -> Iterator[Part]:
    facts = [
        ("architecture", f"{result.architecture} ({result.family})"),
        ("parameters", f"{result.parameters:,} in {result.dtype}"),
        ("layers", result.layers),
        ("query heads / KV heads", f"{result.query_heads} / {result.kv_heads}, head dim {result.head_dim}"),
        ("positions", f"{result.max_position_embeddings:,}"),
        ("license", result.license),
        (
            "GPUs that can split the heads (Ulysses)",
            f"{result.kv_heads} with whole KV heads, {result.query_heads} with copies; ring attention: any number",
        ),
        ("KV cache per token", kv_per_token(result.kv_bytes_per_token, result.kv_bytes_beyond_windows)),
    ]
    facts += [(f"KV cache at {tokens // 1024}k", nbytes(size)) for tokens, size in result.kv_cache_bytes.items()]
    yield Table(result.model, ["", ""], facts)
    yield ""
    yield Table(
        "Layers",
        ["layers", "heads", "window", "RoPE", "q/k norm", "biases", "softcap", "sinks", "KV at 32k"],
        _groups(result),
    )
    yield ""
    yield Table("KV heads it can be converted to", ["KV heads", "possible", "KV cache at 32k", "why not"], [
        (c.kv_heads, c.possible, nbytes(c.kv_cache_bytes[32768]) if c.possible else "", c.reason or "")
        for c in result.conversions
    ])  # fmt: skip


def _positions(result: Inspection | Undescribed, known: bool) -> Iterator[Part]:
    """What engines make of such a configuration, and the linter's verdict."""
    if result.engines:
        yield ""
        yield Table(
            "Engines that were run with such a model, against transformers",
            ["engine", "version", "computes", "difference (nats)", "were it ignored", "note"],
            [
                (
                    one.engine,
                    one.version,
                    _VERDICTS[one.verdict],
                    nats(one.difference),
                    nats(one.control),
                    one.message,
                )
                for one in result.engines
            ],
        )
    if not result.findings and (result.engines or known):
        yield "\nRoPE linter: nothing to complain about"
    for finding in result.findings:
        yield (f"\nRoPE linter, {finding.severity}: {finding.what}\n  where: {finding.where}\n  fix:   {finding.fix}")


_VERDICTS = {
    "same": "the same",
    "differs": "something else",
    "error": "nothing: an error",
    "proves nothing": "not known",
    "not tried": "not tried",
}


def nats(value: float | None) -> str:
    return "" if value is None else f"{value:.1g}" if value < 0.1 else f"{value:.2f}"


def _groups(result: Inspection) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for group in result.groups:
        rope = group.rope
        encoding = "none"
        if rope:
            encoding = f"{rope.rope_type}, theta {rope.theta:g}, {rope.rotary_dim} dims, {rope.pairing}"
        rows.append(
            (
                group.indices,
                f"{group.query_heads} / {group.kv_heads} x {group.head_dim}",
                group.window or "all",
                encoding,
                group.qk_norm or "none",
                ", ".join(group.biases) or "none",
                group.softcap,
                group.sinks,
                nbytes(group.kv_cache_bytes[32768]),
            )
        )
    return rows


def written(result: Written) -> Iterator[Part]:
    """`retrofit convert`, `window`, `extend`, `recover`."""
    if result.report.get("search"):
        yield from _search(result.report["search"])
    if result.step == "window":
        yield from windows.conversion(result.report)
    by_kind = result.report.get("tokens_by_kind")
    if by_kind:
        yield "calibrated on " + ", ".join(f"{tokens:,} tokens of {kind}" for kind, tokens in by_kind.items())
    or_else = " or worse for passages out of sight" if result.step == "window" else ""
    yield from _kept_out(result.report.get("layers", ()), or_else)
    for note in result.report.get("notes", ()):
        yield f"{NOTE}{note}"
    yield f"written: {result.folder}"
    yield f"load it with AutoModelForCausalLM.from_pretrained({python_string(str(result.folder))})"


def _kept_out(layers: Sequence[Mapping[str, Any]], or_else: str = "") -> list[str]:
    """A line for each repair that some of the layers in which it was tried did without. or_else: another reason."""
    tried = [(repair["name"], layer["index"], repair["accepted"]) for layer in layers for repair in layer["repairs"]]
    lines = []
    for name in dict.fromkeys(name for name, _, _ in tried):
        accepted = {index: kept for own, index, kept in tried if own == name}
        out = [index for index, kept in accepted.items() if not kept]
        if out:
            lines.append(
                f"the repair {name} was kept out of {len(out)} of {len(accepted)} layers, no better on text it had not "
                f"seen{or_else}: {ranges(out)}"
            )
    return lines


def _search(found: Mapping[str, Any]) -> Iterator[Part]:
    """The encodings that were compared over the whole length, the best first."""
    last = [trial for trial in found["trials"] if trial["rung"] == found["winner"]["rung"]]
    yield Table(
        f"search: {len(found['trials'])} passes, {found['tokens_read']:,} tokens read (a budget of {found['read']:,}); "
        "nats per token over the whole length",
        ["encoding", "original length", "last tokens", "answers", "objective"],
        [
            (trial["label"], *(f"{trial[name]:.3f}" for name in ("native", "tail", "needle", "objective")))
            for trial in sorted(last, key=lambda trial: trial["objective"])
        ],
    )
    yield f"before the extension, original length: {found['native']:.3f}"


def recipes(result: tuple[RecipeEntry, ...]) -> Iterator[Part]:
    """`retrofit recipes list`."""
    yield Table("", ["recipe", "what it does"], [(entry.name, entry.description) for entry in result])


def health(result: Health) -> Iterator[Part]:
    """`retrofit doctor`."""
    speed = ", ".join(f"{value:,.0f} GFLOP/s {dtype}" for dtype, value in result.gflops.items())
    machine = [
        ("devices", ", ".join(result.devices)),
        ("cores", result.cores),
        ("memory", nbytes(result.memory_bytes)),
        ("free disk here", nbytes(result.free_disk_bytes)),
        ("matrix products", f"{speed} (measured)"),
    ]
    yield Table("Machine", ["", ""], machine)
    yield ""
    yield Table("Packages", ["package", "version"], list(result.versions.items()))
    yield ""
    yield Table(
        "Attention kernels",
        ["kernel", "runs here", "why", "install"],
        [(kernel.name, kernel.available, kernel.reason, kernel.install or "") for kernel in result.kernels],
    )
    yield ""
    yield Table(
        "Optional parts",
        ["part", "there", "for", "install"],
        [(check.name, check.ok, check.what, check.install or "") for check in result.optional],
    )


def by_length(models: Mapping[str, ModelEvaluation]) -> Iterator[Part]:
    """A row per kind of text and length, one cell per model; what text of a kind was read for is that of the last."""
    cells: dict[tuple[str, int], list[str]] = {}
    for model in models.values():
        for row in model.rows:
            cells.setdefault((row.kind, row.length), []).append(f"{row.ppl:.2f} ({row.low:.2f} to {row.high:.2f})")
    if not cells:
        return
    last = list(models.values())[-1]
    seen = last.seen
    rows = [(*key, *values) for key, values in cells.items()]
    yield marked(Table("Perplexity (95% interval)", ["text", "tokens", *models], rows), seen)
    if alike := none_unseen(seen):
        yield alike
    if stored := served_with(last.kv_cache_dtype):
        yield stored
