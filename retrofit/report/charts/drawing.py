"""Drawing: the styles of the models, axes and labels that all charts share, and a figure as SVG text.

Colours are Okabe and Ito's, told apart also by marker, dash and a label at the line itself. `themed` charts leave text,
grid and colours to CSS variables of the page that holds them; plain ones stand alone on white.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.escape import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#101112", "#d0d1d2"
WIDTH, HEIGHT = 4.8, 3.3
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
OTHERS = (Style("#E69F00", "--orange", "v", "dashdot"), Style("#56B4E9", "--sky", "P", "dotted"))
_VARIABLES = {INK: "currentColor", GRID: "var(--grid, #d0d1d2)"} | {
    style.colour: f"var({style.variable}, {style.colour})" for style in (*STYLES.values(), *OTHERS)
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
    return STYLES.get(label, OTHERS[index % len(OTHERS)])


def draw_lines(axes: Axes, lines: Sequence[Line], every: int = 1) -> None:
    for index, line in enumerate(lines):
        style = style_of(line.label, index)
        drawn: dict[str, Any] = {"color": style.colour, "marker": style.marker, "linestyle": style.dash}
        axes.plot(line.x, line.y, markersize=5, linewidth=1.8, markevery=(index % every, every), **drawn)
        for x, (low, high) in zip(line.x, line.interval, strict=False):
            axes.plot([x, x], [low, high], color=style.colour, linewidth=1.0, alpha=0.8)


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
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


def mark(axes: Axes, x: int | None, text: str) -> None:
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


def end_labels(axes: Axes, lines: Sequence[Line]) -> None:
    place_labels(
        axes,
        [
            (line.label, line.x[-1], line.y[-1], style_of(line.label, index).colour)
            for index, line in enumerate(lines)
            if line.x
        ],
    )


def place_labels(axes: Axes, labels: Sequence[tuple[str, float, float, str]], gap: float = 13.0) -> None:
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


def picture(
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
    return visible(out.getvalue(), keep="\n\t")


def themed(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: no prolog, ids of its own, colours by CSS variable, a title for readers."""
    from html import escape

    title = visible(title)
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
