"""What a page is made of: numbers, tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrofit.report.charts.drawing import Picture


@dataclass(frozen=True)
class Number:
    """One key number: its label, the value large, the detail small."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column is a label, the others are numbers. pinned: the last one stays in view."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    pinned: bool = False


@dataclass(frozen=True)
class Passage:
    """A prompt, where it comes from, and what each model writes after it: (label, text)."""

    origin: str
    prompt: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Figure:
    """A chart, what it says, and its data; without a picture the table stands for itself. section: a key of
    `render.SECTIONS`."""

    section: str
    title: str
    caption: str
    table: Table
    picture: Picture | None = None
