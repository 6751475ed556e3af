"""Foreign text made harmless where it is shown or written: in a terminal, JSON, Markdown, a shell line, Python code.

Names of files, models and texts, values of configurations and lines of other people's READMEs are somebody else's
words. Each function takes such a text and returns it for one place; none changes a text that is harmless there.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable

MAX_SHOWN = 300
"""Characters of a foreign value that a message shows."""

# Controls and line breaks, what turns the direction of writing, and surrogates, which no stream can write.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\u200c\u200d"  # joiners that words of several languages need
# What GitHub's and the hub's Markdown read as structure anywhere in a line, and what only at its beginning. Underscores
# inside a word are none.
_ANYWHERE = re.compile(
    r"[\\`*\[\]<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|(?<=[a-zA-Z]):(?=//)|(?<=\bwww)\.", re.IGNORECASE
)
_AT_START = re.compile(r"(?P<number>(\d{1,9}(?=[.)]))?)(?P<mark>(?<!\d)[#>]|[-+.)](?=\s|$)|(?<!\d)[-=](?=[-=]*\s*$))")


class Markdown(str):
    """Text that is Markdown already: what `markdown` leaves as it is."""

    __slots__ = ()


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
    line = visible(str(text)[: limit + 1])  # escapes only lengthen it, and foreign texts can have megabytes
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown(text: object) -> Markdown:
    """Plain words inside a Markdown paragraph, list or heading: no structure, no HTML, no links of its own.

    `Markdown` is given back as it is.
    """
    return text if isinstance(text, Markdown) else Markdown(_escaped(visible(text).strip(), start=True))


def prose(text: object, *, start: bool = True) -> Markdown:
    """Our own sentence, in which `code` stands in backticks, as Markdown; whatever foreign words are in it.

    start: it may stand at the beginning of a block, where a dash or a number with a dot would begin a list.
    `Markdown` is given back as it is.
    """
    if isinstance(text, Markdown):
        return text
    parts = visible(text).strip().split("`")
    if len(parts) % 2 == 0:  # the last one closes nothing
        parts[-2:] = ["`".join(parts[-2:])]
    texts = [_escaped(part, start=start and i == 0) if i % 2 == 0 else _code(part) for i, part in enumerate(parts)]
    return Markdown("".join(texts))


def _code(part: str) -> str:
    return code_span(part) if part else r"\`\`"


def _escaped(line: str, *, start: bool) -> str:
    """A line with a backslash before what would be structure; start: also before what is only at the beginning."""
    begins = _AT_START.match(line) if start else None
    if begins is None:
        return _ANYWHERE.sub(r"\\\g<0>", line)
    return begins["number"] + "\\" + begins["mark"] + _ANYWHERE.sub(r"\\\g<0>", line[begins.end() :])


def code_span(text: object) -> Markdown:
    """A Markdown code span that holds the text whatever backticks are in it."""
    inner = visible(text)
    longest = max((len(run) for run in re.findall(r"`+", inner)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not inner.strip() or inner[0] == inner[-1] == " " else ""
    return Markdown(f"{fence}{pad}{inner}{pad}{fence}")


def table_row(cells: Iterable[object]) -> Markdown:
    """A row of a Markdown table, of `prose`; a bar in a cell, also in a code span, is one character of it."""
    return Markdown("| " + " | ".join(prose(cell, start=False).replace("|", "\\|") for cell in cells) + " |")


def bold(text: object) -> Markdown:
    """`prose` in bold."""
    return Markdown(f"**{prose(text, start=False)}**")


def code_block(text: str, language: str = "") -> Markdown:
    """A fenced Markdown block; the fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{visible(text, keep=chr(10) + chr(9)).rstrip()}\n{fence}")


def json_text(document: str) -> str:
    """A JSON document with the same value in which no character is one that a terminal obeys."""
    return re.sub(r"[^\n -~]", lambda one: one[0] if visible(one[0]) == one[0] else json.dumps(one[0])[1:-1], document)


def shell_word(text: object) -> str:
    """One word of a POSIX shell line; control characters are escapes, so the line stays one line."""
    return shlex.quote(visible(text))


def python_string(text: str) -> str:
    """A Python string literal in double quotes whose value is the text, on one line and in ASCII."""
    escaped = text.encode("unicode_escape", "surrogatepass").decode("ascii")
    return '"' + escaped.replace('"', '\\"') + '"'
