"""The figures of a report: each chart with its caption and its data as a table."""

from __future__ import annotations

from collections.abc import Iterator

from retrofit import format as fmt
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.report.charts import plots
from retrofit.report.charts.drawing import Line, Picture
from retrofit.report.data import RunData
from retrofit.report.parts import Figure, Table
from retrofit.report.sections import context_use, costs, encodings, kinds, summary, tasks

_PERPLEXITY_CAPTION = (
    "How well each model predicts text when it may read this many tokens from the start of a document. Lower is "
    "better; upright bars are 95% intervals; a y axis that spans a wide range is logarithmic."
)


def figures(run: RunData) -> tuple[Figure, ...]:
    """Every chart that the run has data for, in reading order."""
    makers = (
        _perplexities,
        _positions,
        context_use.short_context,
        kinds.by_frequency,
        tasks.figures,
        context_use.figures,
        encodings.figures,
        _training,
        costs.figures,
        _layers,
        _windows,
    )
    return tuple(figure for maker in makers for figure in maker(run))


def card_picture(run: RunData) -> Picture | None:
    """The one chart of the model card: perplexity against context length over all texts; None without measurements."""
    if not run.kinds:
        return None
    kind = ALL if ALL in run.kinds else run.kinds[0]
    return _perplexity(run, kind, "perplexity", alone=True)


def _perplexity(run: RunData, kind: str, name: str, *, alone: bool = False) -> Picture | None:
    lines = []
    for model in run.models:
        rows = sorted((row for row in model.rows if row.kind == kind), key=lambda row: row.length)
        if rows:
            spans = [(row.low, row.high) for row in rows]
            lines.append(Line(model.label, [row.length for row in rows], [row.ppl for row in rows], spans))
    if not lines:
        return None
    title = f"Perplexity against context length, {kinds.kind_name(run, kind)}"
    return plots.perplexity_by_length(
        name, lines, native=run.native_length, title=title, claimed=run.claimed_length, alone=alone
    )


def _perplexities(run: RunData) -> Iterator[Figure]:
    for index, kind in enumerate(run.kinds):
        picture = _perplexity(run, kind, f"perplexity-{index}")
        if picture is None:
            continue
        caption = _PERPLEXITY_CAPTION if index == 0 else ""
        if index == 0 and summary.grew(run):
            caption += " Dotted lines: the original's context length (native) and the new one."
        yield Figure(
            "quality",
            f"Perplexity by context length: {kinds.kind_name(run, kind)}",
            caption,
            summary.comparison(run, kind),
            picture,
        )


def _positions(run: RunData) -> Iterator[Figure]:
    models = [model for model in run.models if model.position_losses]
    if not models:
        return
    lines = [Line(model.label, *map(list, zip(*model.position_losses, strict=True))) for model in models]
    title = "Loss by position in the document"
    picture = plots.loss_by_position("positions", lines, native=run.native_length, title=title)
    places = sorted({position for model in models for position, _ in model.position_losses})
    found = [dict(model.position_losses) for model in models]
    rows = [(fmt.count(round(place)), *(fmt.number(one.get(place)) for one in found)) for place in places]
    caption = (
        "The mean loss of the tokens around each position. A line that falls or stays level uses its context; one that "
        "climbs has lost track of where its tokens are."
    )
    yield Figure("quality", title, caption, Table(("position", *(m.label for m in models)), tuple(rows)), picture)


def _training(run: RunData) -> Iterator[Figure]:
    if not any(loss is not None or held is not None for _, loss, held in run.training):
        return
    title = "Loss during training"
    rows = [(fmt.count(step), fmt.number(loss), fmt.number(held)) for step, loss, held in run.training]
    held = [(loss, step) for step, _, loss in run.training if loss is not None]
    caption = "The loss on the training text (thin line) and on documents kept out of it (squares)."
    if held:
        best, step = min(held)
        caption += f" Best held-out loss: {fmt.number(best)} at step {fmt.count(step)}; that state is kept."
    picture = plots.training_curve("training", run.training, title=title)
    yield Figure("training", title, caption, Table(("step", "training loss", "held-out loss"), tuple(rows)), picture)


def _layers(run: RunData) -> Iterator[Figure]:
    found = sorted(run.conversion.layers if run.conversion else (), key=lambda one: one.index)
    costs = {"keys": [one.keys for one in found], "values": [one.values for one in found]}
    costs = {name: values for name, values in costs.items() if any(value is not None for value in values)}
    if not costs:
        return
    table = summary.layers(run)
    title = "What the conversion cost in each layer"
    worst = ", ".join(row[0] for row in table.rows[:3])
    caption = (
        "The share of what a layer's keys and values did for attention that fewer heads cannot hold. "
        f"Layers that lost most: {worst}. The table has the costliest first."
    )
    yield Figure("conversion", title, caption, table, plots.layer_costs("layers", costs, title=title))


def _windows(run: RunData) -> Iterator[Figure]:
    if run.windows is None:
        return
    rows = []
    for layer in run.windows["layers"]:
        [repair] = layer["repairs"] or [None]
        refit = "–" if repair is None else "kept" if repair["accepted"] else "not kept"
        cells = [fmt.number(100 * layer[name]) for name in ("mass", "bare", "lost")]
        seen = fmt.count(layer["window"]) if layer["window"] else "everything"
        rows.append((str(layer["index"]), seen, fmt.count(layer["sinks"]), *cells, refit))
    caption = (
        "Of each layer: the tokens it sees, its query heads with an attention sink, what its softmax puts outside of "
        "the window, what of its output's energy is lost without sinks and with them (all in %, before repair), and "
        "whether its output projection was refitted."
    )
    headers = ("layer", "sees", "sinks", "mass outside", "lost without sinks", "lost with sinks", "refit")
    yield Figure("conversion", "Sliding windows, layer by layer", caption, Table(headers, tuple(rows)))
