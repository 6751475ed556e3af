"""The charts of a report: functions of plain data, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrofit import format as fmt
from retrofit.report.charts.drawing import (
    GRID,
    INK,
    OTHERS,
    STYLES,
    Line,
    Picture,
    draw_lines,
    end_labels,
    log_if_wide,
    mark,
    picture,
    place_labels,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        axes.set_xticks(ticks, [fmt.tokens(int(x)) for x in ticks])
        axes.minorticks_off()
        draw_lines(axes, lines)
        log_if_wide(axes, [y for line in lines for y in line.y])
        mark(axes, native, "native")
        if claimed and claimed != native:
            mark(axes, claimed, "new")
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel("perplexity, lower is better")
        end_labels(axes, lines)

    return picture(name, title, draw, alone=alone)


def loss_by_kv_heads(name: str, lines: Sequence[Line], *, title: str = "", alone: bool = False) -> Picture:
    """Increase of the loss (y, nats) against the number of KV heads (x, base-2 logarithm, the most at the left)."""
    palette = [*STYLES.values(), *OTHERS]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xticks(ticks, [str(int(x)) for x in ticks])
        axes.minorticks_off()
        axes.invert_xaxis()
        for line, style in zip(lines, palette, strict=False):
            drawn: dict[str, Any] = {"color": style.colour, "marker": style.marker, "linestyle": style.dash}
            axes.plot(line.x, line.y, markersize=5, linewidth=1.8, **drawn)
        log_if_wide(axes, [y for line in lines for y in line.y])
        axes.set_xlabel("KV heads")
        axes.set_ylabel("loss beyond the original's (nats)")
        ends = [(line.label, line.x[-1], line.y[-1], s.colour) for line, s in zip(lines, palette, strict=False)]
        place_labels(axes, ends)

    return picture(name, title, draw, alone=alone)


def loss_by_kv_cache(
    name: str, lines: Sequence[Line], *, least: float, title: str = "", alone: bool = False
) -> Picture:
    """Increase of the loss (y, nats, logarithmic) against bytes of the KV cache (x, base-2 logarithm, the most at the
    left). least: what is smaller, or no increase, stands at it. Points of a line are not joined."""
    palette = [*STYLES.values(), *OTHERS]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(lambda value, _: fmt.nbytes(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        ends = []
        for line, style in zip(lines, palette, strict=False):
            y = [max(value, least) for value in line.y]
            axes.plot(line.x, y, markersize=6, color=style.colour, marker=style.marker, linestyle="none")
            ends.append((line.label, line.x[-1], y[-1], style.colour))
        axes.set_xlabel("KV cache")
        axes.set_ylabel("loss beyond the original's (nats)")
        place_labels(axes, ends)

    return picture(name, title, draw, alone=alone)


def perplexity_by_seconds(
    name: str,
    lines: Sequence[Line],
    *,
    original: float,
    apart: Collection[str] = (),
    title: str = "",
    alone: bool = False,
) -> Picture:
    """Perplexity (y) against seconds of compute (x), both on logarithmic axes, above that of the original.

    apart: labels of lines whose points are not steps on one way, and are not joined.
    """
    palette = [*STYLES.values(), *OTHERS]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):  # numbers, not the powers of ten that only matplotlib's TeX can set
            axis.set_major_formatter(lambda value, _: fmt.count(int(value)))
            axis.set_minor_formatter(lambda value, _: "")
        for line, style in zip(lines, palette, strict=False):
            dash = "none" if line.label in apart else style.dash
            drawn: dict[str, Any] = {"color": style.colour, "marker": style.marker, "linestyle": dash}
            axes.plot(line.x, line.y, markersize=5, linewidth=1.8, **drawn)
        axes.axhline(original, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xlabel("seconds of one core")
        axes.set_ylabel("perplexity, lower is better")
        ends = [(line.label, line.x[-1], line.y[-1], s.colour) for line, s in zip(lines, palette, strict=False)]
        place_labels(axes, [*ends, ("original", max(x for line in lines for x in line.x), original, INK)])

    return picture(name, title, draw, alone=alone)


def loss_by_position(name: str, lines: Sequence[Line], *, native: int | None, title: str = "") -> Picture:
    """Mean loss (y, nats) against position in the document (x, tokens)."""

    def draw(axes: Axes) -> None:
        draw_lines(axes, lines, every=4)
        mark(axes, native, "native")
        axes.set_xlabel("position in the document (tokens)")
        axes.set_ylabel("loss (nats), lower is better")
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda x, _: fmt.count(int(x)))
        end_labels(axes, lines)

    return picture(name, title, draw)


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
        log_if_wide(axes, [loss for _, loss in (*seen, *held)])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        ends = [("training", seen, "original"), ("held out", held, "converted")]
        place_labels(axes, [(text, *at[-1], STYLES[style].colour) for text, at, style in ends if at])

    return picture(name, title, draw)


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

    return picture(name, title, draw, height=max(1.3, 0.9 + 0.25 * rows))


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
        place_labels(axes, [(line.label, line.x[-1], line.y[-1], palette[line.label].colour) for line in lines])

    return picture(name, title, draw)


def heat_map(
    name: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    cells: Mapping[tuple[int, float], tuple[float, str]],
    *,
    title: str = "",
) -> Picture:
    """Context length (x) by depth (y, the beginning at the top): cells[length, depth] = (share in [0, 1], its text).

    Colours run from dark blue (0) to light yellow (1) in steps of lightness, so that they are told apart without hue. A
    cell that is not given was not asked, and is drawn so.
    """

    def draw(axes: Axes) -> None:
        import matplotlib
        from matplotlib.patches import Rectangle

        shades = matplotlib.colormaps["cividis"]
        for (length, depth), (share, text) in cells.items():
            x, y = lengths.index(length), depths.index(depth)
            shade = shades(share)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor=GRID, linewidth=1.2))
            light = 0.2126 * shade[0] + 0.7152 * shade[1] + 0.0722 * shade[2] > 0.4
            written = "#010101" if light else "#ffffff"
            axes.annotate(text, (x, y), ha="center", va="center", fontsize=9.0, color=written)
        for x, y in ((x, y) for x, n in enumerate(lengths) for y, d in enumerate(depths) if (n, d) not in cells):
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=GRID, linewidth=1.2))
            axes.annotate("not asked", (x, y), ha="center", va="center", fontsize=9.0, color=INK)
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.set_xticks(range(len(lengths)), [fmt.tokens(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel("depth of the fact")
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return picture(name, title, draw, height=1.0 + 0.5 * len(depths))


def encodings_tried(
    name: str,
    earlier: Sequence[tuple[float, float]],
    last: Sequence[tuple[float, float, str, str]],
    *,
    title: str = "",
) -> Picture:
    """Loss beyond the original's within its context length (x, nats) against loss of the last tokens (y, nats).

    earlier: small dots. last: (x, y, label, role); the roles `chosen` and `reference` are named in the chart.
    """

    def draw(axes: Axes) -> None:
        if earlier:
            axes.plot(*zip(*earlier, strict=True), linestyle="none", marker=".", markersize=4, color=INK, alpha=0.35)
        for x, y, label, role in last:
            style = STYLES[{"chosen": "recovered", "reference": "converted"}.get(role, "original")]
            size = 9 if role else 6
            axes.plot([x], [y], linestyle="none", marker=style.marker, markersize=size, color=style.colour)
            if role:
                named = "YaRN" if label.startswith("yarn") and role == "reference" else role
                above = 8 if role == "reference" else -16
                written: dict[str, Any] = {"color": style.colour, "fontweight": "bold", "ha": "center"}
                axes.annotate(named, (x, y), (0, above), textcoords="offset points", **written)
        axes.margins(x=0.12, y=0.14)
        axes.set_xlabel("excess loss within the original length (nats)")
        axes.set_ylabel("loss of the last tokens (nats)")

    return picture(name, title, draw)


def decode_by_context(name: str, lines: Sequence[Line], bounds: Sequence[Line], *, title: str = "") -> Picture:
    """Decoded tokens per second (y) against the tokens in the cache (x, base-2 logarithm); bounds: thin and dashed."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xticks(ticks, [fmt.tokens(int(x)) for x in ticks])
        axes.minorticks_off()
        draw_lines(axes, lines)
        for index, line in enumerate(bounds):
            colour = style_of(line.label, index).colour
            axes.plot(line.x, line.y, color=colour, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.9)
        values = [y for line in (*lines, *bounds) for y in line.y]
        log_if_wide(axes, values)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("decoded tokens per second")
        ends = [(line.label, line.x[-1], line.y[-1], style_of(line.label, i).colour) for i, line in enumerate(lines)]
        ends += [("bound", line.x[-1], line.y[-1], style_of(line.label, i).colour) for i, line in enumerate(bounds)]
        place_labels(axes, ends)

    return picture(name, title, draw)
