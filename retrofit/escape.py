"""Foreign text made harmless where it is shown or written: in a terminal, Markdown, a shell line, Python code.

Names of files, models and texts, values of configurations and lines of other people's READMEs are somebody else's
words. Each function takes such a text and returns it for one place; none changes a text that is harmless there.
"""

from __future__ import annotations

import re
import shlex
import unicodedata

MAX_SHOWN = 300
"""Characters of a foreign value that a message shows."""

# Controls and line breaks, what turns the direction of writing, and surrogates, which no stream can write.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\u200c\u200d"  # joiners that words of several languages need
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#!|<>~$])")


def visible(text: object, *, keep: str = "") -> str:
    """The text with control, direction and surrogate characters as escapes: `\\x1b` instead of the character.

    keep: characters that stay, for example a newline where the text may have several lines.
    """
    return "".join(
        character
        if character in keep or character in _KEPT or unicodedata.category(character) not in _UNSEEN
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in str(text)
    )


def shown(text: object, limit: int = MAX_SHOWN) -> str:
    """One line for a message: `visible`, and cut when it is longer than `limit`."""
    line = visible(text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown(text: object) -> str:
    """Plain words inside a Markdown paragraph, list or table cell: no structure, no HTML, no links of its own."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def code_span(text: object) -> str:
    """A Markdown code span that holds the text whatever backticks are in it; a vertical bar would end a table cell."""
    inner = visible(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", inner)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not inner.strip() else ""
    return f"{fence}{pad}{inner}{pad}{fence}"


def code_block(text: str, language: str) -> str:
    """A fenced Markdown block; the fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text, keep=chr(10) + chr(9)).rstrip()}\n{fence}"


def shell_word(text: object) -> str:
    """One word of a POSIX shell line; control characters are escapes, so the line stays one line."""
    return shlex.quote(visible(text))


def python_string(text: str) -> str:
    """A Python string literal in double quotes whose value is the text, on one line and in ASCII."""
    escaped = text.encode("unicode_escape", "surrogatepass").decode("ascii")
    return '"' + escaped.replace('"', '\\"') + '"'
