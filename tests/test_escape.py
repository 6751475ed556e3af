"""Foreign text keeps its meaning where it is shown and gets no power there."""

from __future__ import annotations

import ast
import shlex

import pytest

from retrofit.escape import code_block, code_span, markdown, python_string, shell_word, shown, visible

NASTY = "a\x1b]0;x\x07\u202e\"'`$(id)\n```python\nprint(1)\n|<b>[x](y)\\ \ud800é"


def test_controls_become_escapes_and_other_letters_stay() -> None:
    assert visible("naïve 中文 \x1b[31m\u202e\ud800\x00") == "naïve 中文 \\x1b[31m\\u202e\\ud800\\x00"


def test_a_line_for_a_message_is_one_line_of_limited_length() -> None:
    assert shown("a\nb" + "c" * 1000, 10) == "a\\nbccccc…"


def test_words_in_markdown_have_no_structure() -> None:
    assert markdown("a|b <script> [x](y) `z`") == "a\\|b \\<script\\> \\[x\\]\\(y\\) \\`z\\`"


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
