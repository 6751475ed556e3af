"""A result as tables and lines: data that a terminal, a log and a notebook show, each in its own way.

Names in what is shown are foreign: their control characters are shown as escapes, and nothing in them is markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from retrofit.escape import visible


@dataclass(frozen=True)
class Table:
    """A table of any values."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def cells(self) -> list[list[str]]:
        """The values as people read them."""
        return [[visible(cell(value)) for value in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and are aligned right."""
        cells = self.cells
        return [bool(cells) and all(_is_number(row[index]) for row in cells) for index in range(len(self.columns))]


Part = Table | str
"""A table, or lines of text."""
NOTE = "note: "
"""How the line of a note begins."""


def plain_text(table: Table) -> str:
    """The table as aligned text without colours."""
    columns, cells = [visible(column) for column in table.columns], table.cells
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(row, widths, table.numeric, strict=True)]
        return "  ".join(padded).rstrip()

    lines = [visible(table.title)] if table.title else []
    return "\n".join([*lines, line(columns), line(["-" * w for w in widths]), *(line(row) for row in cells)])


def print_rich(table: Table, stream: TextIO) -> None:
    """The table with rules and bold headings, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    title = Text(visible(table.title)) if table.title else None
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column, numeric in zip(table.columns, table.numeric, strict=True):
        shown.add_column(Text(visible(column)), justify="right" if numeric else "left")
    for row in table.cells:
        shown.add_row(*map(Text, row))
    Console(file=stream).print(shown)


def as_html(parts: Iterable[Part]) -> str:
    """The parts for a notebook; every text in them is escaped."""
    return "\n".join(_html_table(part) if isinstance(part, Table) else _html_lines(part) for part in parts)


def _html_table(table: Table) -> str:
    align = ["right" if numeric else "left" for numeric in table.numeric]

    def row(tag: str, cells: Iterable[str]) -> str:
        inner = (
            f'<{tag} style="text-align: {side}">{_escaped(text)}</{tag}>'
            for text, side in zip(cells, align, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    caption = f'<caption style="text-align: left">{_escaped(table.title)}</caption>' if table.title else ""
    body = "".join(row("td", cells) for cells in table.cells)
    return f"<table>{caption}<thead>{row('th', table.columns)}</thead><tbody>{body}</tbody></table>"


def _html_lines(text: str) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    return f"<p>{'<br>'.join(map(_escaped, lines))}</p>" if lines else ""


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def cell(value: object) -> str:
    """One value of a table as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "").replace("-", "").replace("e+", "").isdigit()
