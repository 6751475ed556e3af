"""A report whose every name tries to be something else has the structure of one with plain names."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from retrofit.escape import visible
from retrofit.publishing.gate import GateResult
from retrofit.report.charts import plots
from retrofit.report.charts.drawing import Line
from retrofit.report.data import RunData
from retrofit.report.render import html, markdown
from tests.hostile import HOSTILE
from tests.report.made_up import run


def named(name: str) -> RunData:
    """A run in which everything that comes from outside is this name."""
    data = run()

    def renamed(rows: tuple[Any, ...], field: str, old: str) -> tuple[Any, ...]:
        return tuple(replace(row, **{field: name}) if getattr(row, field) == old else row for row in rows)

    models = tuple(
        replace(
            model,
            rows=renamed(model.rows, "kind", "python-docs"),
            tasks=renamed(model.tasks, "task", "arc_easy"),
            task_changes=renamed(model.task_changes, "task", "arc_easy"),
        )
        for model in data.models
    )
    return replace(
        data,
        name=f"run {name}",
        model=f"someone/tiny {name}",
        created=f"2026 {name}",
        description=name,
        models=models,
        conversion=replace(data.conversion, method=name, notes=(f"note {name}",)),  # type: ignore[type-var]
        gate=(GateResult(f"ppl@64/{name}", name, 1.0, False, name),),
        notes=(name, f"`{name}` was read by {name}"),
        recipe_yaml=name,
        commands=(name.replace("\n", " "),),
        versions={"python": name},
    )


class Page(HTMLParser):
    """The elements of a page with their attributes, and the words that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


IN_WORDS = ("code", "small")  # what is set as code, and what stands in brackets


@pytest.fixture(scope="module")
def plain() -> tuple[list[Any], list[Any]]:
    data = named("plain")
    return elements(html(data, ())), structure(markdown(data, ()))


def elements(text: str) -> list[Any]:
    return [element for element in Page(text).elements if element[0] not in IN_WORDS]


def structure(text: str) -> list[Any]:
    words = ("text", "text_special", "softbreak", "code_inline")
    reader = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
    every = (inner for token in reader.parse(text) for inner in (token, *(token.children or ())))
    return [(token.type, token.info, token.attrs) for token in every if token.type not in words]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_has_the_elements_of_one_with_plain_names(name: str, plain: tuple[list[Any], list[Any]]) -> None:
    page = html(named(name), ())
    assert elements(page) == plain[0]
    assert visible(page, keep="\n\t") == page
    assert visible(f"run {name}", keep="\n").strip() in "".join(Page(page).words)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_markdown_report_has_the_structure_of_one_with_plain_names(
    name: str, plain: tuple[list[Any], list[Any]]
) -> None:
    text = markdown(named(name), ())
    assert structure(text) == plain[1]
    assert visible(text, keep="\n\t") == text


CHART = {"svg", "title", "g", "path", "defs", "style", "use", "text", "rect", "clippath"}


@pytest.mark.filterwarnings("ignore:Glyph")
def test_charts_show_names_as_words() -> None:
    name = '"><script>alert(1)</script>\x1b[2J\u202e$x$'
    drawn = plots.perplexity_by_length("a", [Line(name, [64, 128], [2.0, 3.0])], native=None, title=name).themed
    assert {tag for tag, _ in Page(drawn).elements} <= CHART
    assert visible(drawn, keep="\n\t") == drawn
    assert Page(drawn).words.count(visible(name)) == 2
