"""Foreign text keeps its meaning where it is shown and gets no power there."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Callable

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from retrofit import escape
from retrofit.errors import UserError
from retrofit.escape import (
    code_block,
    code_span,
    json_text,
    markdown,
    prose,
    python_string,
    shell_word,
    shown,
    table_row,
    visible,
)
from tests.hostile import HOSTILE

NASTY = "a\x1b]0;x\x07\u202e\"'`$(id)\n```python\nprint(1)\n|<b>[x](y)\\ \ud800é"


def test_controls_become_escapes_and_other_letters_stay() -> None:
    assert visible("naïve 中文 \x1b[31m\u202e\ud800\x00") == "naïve 中文 \\x1b[31m\\u202e\\ud800\\x00"


def test_a_line_for_a_message_is_one_line_of_limited_length() -> None:
    assert shown("a\nb" + "c" * 1000, 10) == "a\\nbccccc…"


def test_words_in_markdown_have_no_structure() -> None:
    assert markdown("a|b <script> [x](y) `z`") == "a\\|b \\<script> \\[x\\](y) \\`z\\`"


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`", NASTY])
def test_a_code_span_cannot_be_closed_from_inside(text: str) -> None:
    span = code_span(text)
    fence = span[: len(span) - len(span.lstrip("`"))]
    assert span.endswith(fence)
    assert fence not in span[len(fence) : -len(fence)]


def test_a_code_block_cannot_be_closed_from_inside() -> None:
    lines = code_block(NASTY, "yaml").splitlines()
    assert lines[0] == "````yaml"
    assert lines.index("````") == len(lines) - 1


def test_a_shell_word_is_one_word_on_one_line() -> None:
    assert shlex.split(f"echo {shell_word(NASTY)}") == ["echo", visible(NASTY)]
    assert "\n" not in shell_word(NASTY)


def test_a_python_string_evaluates_to_the_text() -> None:
    assert ast.literal_eval(python_string(NASTY)) == NASTY
    assert python_string(NASTY).isascii()


def rendered(text: str) -> list[Token]:
    """The tokens of Markdown as GitHub reads it: tables and struck words, and bare links."""
    return MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"]).parse(text)


def plain(inline: Token) -> str:
    """The words of inline tokens; an assertion fails if there is anything but words and code."""
    kinds = {token.type for token in inline.children or ()}
    assert kinds <= {"text", "code_inline", "text_special"}, kinds
    return "".join(token.content for token in inline.children or ())


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("show", [markdown, prose, code_span])
def test_foreign_words_are_words_in_markdown(text: str, show: Callable[[str], str]) -> None:
    before, paragraph, after = (t for t in rendered(f"before\n\n{show(text)}\n\nafter") if t.type == "inline")
    assert (before.content, after.content) == ("before", "after")
    assert plain(paragraph).strip("` ") == visible(text).strip("` ") or show is prose
    listed = rendered(f"- {show(text)}")
    assert [token.type for token in listed if token.nesting == 1] == [
        "bullet_list_open",
        "list_item_open",
        "paragraph_open",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_words_fill_one_cell_of_a_table(text: str) -> None:
    table = f"{table_row(['a', 'b'])}\n|---|---|\n{table_row([text, code_span(text)])}\n"
    cells = [token for token in rendered(table) if token.type == "inline"]
    assert len(cells) == 4
    assert plain(cells[3]).strip() == visible(text).strip()
    plain(cells[2])


def test_prose_sets_code_and_harmless_words_stay_as_they_are() -> None:
    text = "`yarn` at 16,384 tokens (1.40 times), lm_head of arc_easy: x-y 3.5 % e.g. a.b"
    assert prose(text) == text
    assert prose("it's `a|b` <= 2 of `") == "it's `a|b` \\<= 2 of \\`"
    assert prose(prose("a*b")) == "a\\*b"


@pytest.mark.parametrize("text", HOSTILE)
def test_json_shows_no_control_character_and_keeps_the_value(text: str) -> None:
    document = json_text(json.dumps({"x": text}, ensure_ascii=False, indent=2))
    assert json.loads(document) == {"x": text}
    assert visible(document, keep="\n") == document


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_shows_foreign_words_as_words(text: str) -> None:
    said = str(UserError(f"`{text}` is wrong:\n  - one", where=text, fix=text))
    assert said.splitlines() == [
        f"`{visible(text)}` is wrong:",
        "  - one",
        f"  where: {visible(text)}",
        f"  fix:   {visible(text)}",
    ]


def test_bold_words_stay_bold_in_a_row() -> None:
    assert escape.table_row(["size", escape.bold("÷ 3")]) == "| size | **÷ 3** |"
    assert escape.bold("a*b") == "**a\\*b**"
