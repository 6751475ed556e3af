"""Charts as SVG text: functions of plain data, the same bytes for the same data.

Colours are Okabe and Ito's, told apart also by marker, dash and a label at the line itself. `themed` charts leave text,
grid and colours to CSS variables of the page that holds them; plain ones stand alone on white.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.report import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#101112", "#d0d1d2"
WIDTH, HEIGHT = 5.4, 3.5
LOG_ABOVE = 8.0
"""A y axis spanning more than this factor is logarithmic."""


@dataclass(frozen=True)
class Style:
    """How one model is drawn; variable is the CSS variable that themed charts use for its colour."""

    colour: str
    variable: str
    marker: str
    dash: str | tuple[int, tuple[float, ...]]


STYLES: dict[str, Style] = {
    "original": Style("#0072B2", "--blue", "o", "solid"),
    "converted": Style("#D55E00", "--vermillion", "s", (0, (2.0, 1.5))),
    "extended": Style("#CC79A7", "--purple", "D", (0, (6.0, 2.0))),
    "recovered": Style("#009E73", "--green", "^", (0, (5.0, 1.2, 1.2, 1.2))),
}
_OTHERS = (Style("#E69F00", "--orange", "v", "dashdot"), Style("#56B4E9", "--sky", "P", "dotted"))
_VARIABLES = {INK: "currentColor", GRID: "var(--grid, #d0d1d2)"} | {
    style.colour: f"var({style.variable}, {style.colour})" for style in (*STYLES.values(), *_OTHERS)
}


@dataclass(frozen=True)
class Line:
    """One labelled line: x, y and, where known, the interval (low, high) of each y."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    interval: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Picture:
    """A drawn chart: SVG for the page and, when asked for, SVG and PNG that stand alone on white."""

    name: str
    themed: str
    svg: str = ""
    png: bytes = b""


def style_of(label: str, index: int = 0) -> Style:
    """The style of a model; others take turns through the remaining colours."""
    return STYLES.get(label, _OTHERS[index % len(_OTHERS)])


def perplexity_by_length(
    name: str,
    lines: Sequence[Line],
    *,
    native: int | None,
    title: str = "",
    claimed: int | None = None,
    alone: bool = False,
) -> Picture:
    """Perplexity (y) with 95% intervals against context length in tokens (x, base-2 logarithm).

    alone: also draw the files that stand alone."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xticks(ticks, [words.tokens(int(x)) for x in ticks])
        axes.minorticks_off()
        _lines(axes, lines)
        _log_if_wide(axes, [y for line in lines for y in line.y])
        _mark(axes, native, "native")
        if claimed and claimed != native:
            _mark(axes, claimed, "new")
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel("perplexity, lower is better")
        _end_labels(axes, lines)

    return _picture(name, title, draw, alone=alone)


def loss_by_kv_heads(name: str, lines: Sequence[Line], *, title: str = "", alone: bool = False) -> Picture:
    """Increase of the loss (y, nats) against the number of KV heads (x, base-2 logarithm, the most at the left)."""
    palette = [*STYLES.values(), *_OTHERS]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xticks(ticks, [str(int(x)) for x in ticks])
        axes.minorticks_off()
        axes.invert_xaxis()
        for line, style in zip(lines, palette, strict=False):
            drawn: dict[str, Any] = {"color": style.colour, "marker": style.marker, "linestyle": style.dash}
            axes.plot(line.x, line.y, markersize=5, linewidth=1.8, **drawn)
        _log_if_wide(axes, [y for line in lines for y in line.y])
        axes.set_xlabel("KV heads")
        axes.set_ylabel("loss beyond the original's (nats)")
        ends = [(line.label, line.x[-1], line.y[-1], s.colour) for line, s in zip(lines, palette, strict=False)]
        _place_labels(axes, ends)

    return _picture(name, title, draw, alone=alone)


def perplexity_by_seconds(
    name: str, lines: Sequence[Line], *, original: float, title: str = "", alone: bool = False
) -> Picture:
    """Perplexity (y) against seconds of compute (x), both on logarithmic axes, above that of the original."""
    palette = [*STYLES.values(), *_OTHERS]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for line, style in zip(lines, palette, strict=False):
            drawn: dict[str, Any] = {"color": style.colour, "marker": style.marker, "linestyle": style.dash}
            axes.plot(line.x, line.y, markersize=5, linewidth=1.8, **drawn)
        axes.axhline(original, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xlabel("seconds of one core")
        axes.set_ylabel("perplexity, lower is better")
        ends = [(line.label, line.x[-1], line.y[-1], s.colour) for line, s in zip(lines, palette, strict=False)]
        _place_labels(axes, [*ends, ("original", max(x for line in lines for x in line.x), original, INK)])

    return _picture(name, title, draw, alone=alone)


def loss_by_position(name: str, lines: Sequence[Line], *, native: int | None, title: str = "") -> Picture:
    """Mean loss (y, nats) against position in the document (x, tokens)."""

    def draw(axes: Axes) -> None:
        _lines(axes, lines, every=4)
        _mark(axes, native, "native")
        axes.set_xlabel("position in the document (tokens)")
        axes.set_ylabel("loss (nats), lower is better")
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda x, _: words.count(int(x)))
        _end_labels(axes, lines)

    return _picture(name, title, draw)


def training_curve(
    name: str, training: Sequence[tuple[int, float | None, float | None]], *, title: str = ""
) -> Picture:
    """Training loss (thin line) and held-out loss (marked line) against optimizer steps."""
    seen = [(step, loss) for step, loss, _ in training if loss is not None]
    held = [(step, loss) for step, _, loss in training if loss is not None]

    def draw(axes: Axes) -> None:
        if seen:
            axes.plot(*zip(*seen, strict=True), color=STYLES["original"].colour, linewidth=1.0, alpha=0.9)
        if held:
            axes.plot(*zip(*held, strict=True), color=STYLES["converted"].colour, marker="s", linewidth=1.8)
        _log_if_wide(axes, [loss for _, loss in (*seen, *held)])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        ends = [("training", seen, "original"), ("held out", held, "converted")]
        _place_labels(axes, [(text, *at[-1], STYLES[style].colour) for text, at, style in ends if at])

    return _picture(name, title, draw)


def bars(
    name: str,
    groups: Mapping[str, Mapping[str, float | None]],
    *,
    label: str,
    show: Callable[[float | None], str],
    title: str = "",
) -> Picture:
    """Horizontal bars: groups[model][category] = value, its value written at each bar."""
    categories = list(dict.fromkeys(key for group in groups.values() for key in group))
    rows = sum(1 for _ in categories for _ in groups)

    def draw(axes: Axes) -> None:
        height = 0.8 / max(len(groups), 1)
        for index, (model, values) in enumerate(groups.items()):
            style = style_of(model, index)
            for position, category in enumerate(categories):
                value = values.get(category)
                if value is None:
                    continue
                y = position + (index - (len(groups) - 1) / 2) * height
                axes.barh(y, value, height * 0.92, color=style.colour, alpha=0.9, linewidth=0)
                name_it = f"{model}  {show(value)}" if len(groups) > 1 else show(value)
                axes.annotate(name_it, (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9.5)
        axes.set_yticks(range(len(categories)), categories)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
        axes.margins(x=0.36)

    return _picture(name, title, draw, height=max(1.3, 0.9 + 0.25 * rows))


def layer_costs(name: str, costs: Mapping[str, Sequence[float | None]], *, title: str = "") -> Picture:
    """Share lost (y) in every layer (x), one marked line per quantity."""
    palette = {label: STYLES[key] for label, key in zip(costs, ("original", "converted", "recovered"), strict=False)}
    lines = [
        Line(label, [i for i, value in enumerate(values) if value is not None], [v for v in values if v is not None])
        for label, values in costs.items()
    ]
    lines = [line for line in lines if line.x]

    def draw(axes: Axes) -> None:
        for line in lines:
            style = palette[line.label]
            axes.plot(line.x, line.y, color=style.colour, marker=style.marker, markersize=4, linestyle=style.dash)
        axes.set_xlabel("layer")
        axes.set_ylabel("share lost, lower is better")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.locator_params(axis="x", integer=True)
        _place_labels(axes, [(line.label, line.x[-1], line.y[-1], palette[line.label].colour) for line in lines])

    return _picture(name, title, draw)


def _lines(axes: Axes, lines: Sequence[Line], every: int = 1) -> None:
    for index, line in enumerate(lines):
        style = style_of(line.label, index)
        drawn: dict[str, Any] = {"color": style.colour, "marker": style.marker, "linestyle": style.dash}
        axes.plot(line.x, line.y, markersize=5, linewidth=1.8, markevery=(index % every, every), **drawn)
        for x, (low, high) in zip(line.x, line.interval, strict=False):
            axes.plot([x, x], [low, high], color=style.colour, linewidth=1.0, alpha=0.8)


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= LOG_ABOVE * min(positive):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [digit * 10.0**power for power in decades for digit in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _mark(axes: Axes, x: int | None, text: str) -> None:
    if not x:
        return
    low, high = axes.get_xlim()
    if not low <= x <= high:
        return
    axes.axvline(x, color=INK, linestyle=(0, (1.0, 2.0)), linewidth=1.0, zorder=1.5)
    axes.annotate(
        text,
        (x, 1.0),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=9.5,
    )


def _end_labels(axes: Axes, lines: Sequence[Line]) -> None:
    _place_labels(
        axes,
        [
            (line.label, line.x[-1], line.y[-1], style_of(line.label, index).colour)
            for index, line in enumerate(lines)
            if line.x
        ],
    )


def _place_labels(axes: Axes, labels: Sequence[tuple[str, float, float, str]], gap: float = 13.0) -> None:
    """Names at the right edge, level with the ends of their lines and pushed apart to at least `gap` points."""
    scale = 72.0 / axes.figure.dpi
    axes.figure.canvas.draw()
    ends = sorted((axes.transData.transform((x, y))[1] * scale, text, y, colour) for text, x, y, colour in labels)
    places: list[float] = []
    for height, *_ in ends:
        places.append(max(height, places[-1] + gap) if places else height)
    for (height, text, y, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            text,
            (1.0, y),
            (6, place - height),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def _picture(
    name: str, title: str, draw: Callable[[Axes], None], height: float = HEIGHT, alone: bool = False
) -> Picture:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), dpi=100, layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        page = themed(_svg(figure), name, title)
        if not alone:
            return Picture(name, page)
        figure.set_facecolor("white")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
        return Picture(name, page, _svg(figure), png.getvalue())


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def themed(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: no prolog, ids of its own, colours by CSS variable, a title for readers."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(re.escape(colour), variable, svg, flags=re.IGNORECASE)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    head = re.sub(r' xmlns(:xlink)?="[^"]*"', "", head).replace("xlink:", "")
    body = body.replace("xlink:href", "href")
    return f'{head} role="img"><title>{escape(title)}</title>{body.strip()}'
