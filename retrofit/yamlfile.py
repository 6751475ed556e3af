"""YAML that somebody else wrote: read into plain values within limits, with the line of every key.

PyYAML scans and parses; tags, aliases and numbers are decided here, so that no text can run code, take memory or time
beyond its own length, or stand for a value that its writer did not mean.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
)

from retrofit.escape import shown, visible

MAX_CHARACTERS = 256 << 10
"""Longest text that is read. A recipe with every key written out has 4,000; PyYAML takes up to 20 us a character."""
MAX_BYTES = 4 * MAX_CHARACTERS
MAX_DEPTH = 40
"""Deepest nesting, what aliases stand for included."""
MAX_VALUES = 20_000
"""Most values of a text, those that aliases stand for counted wherever they stand."""
MAX_DIGITS = 64
"""Longest whole number. The largest that any key takes has 19 digits."""

Key = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*|0b[01]+|0x[0-9a-fA-F]+)")
_OCTAL = re.compile(r"[-+]?0[0-9]+")
_NOT_FINITE = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_SIXTIETHS = "is a number to the base of 60 in YAML 1.1; write it plainly, or quote it"
_CLOSED = re.compile(r"^---[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a text, in which line and below which key."""

    line: int
    key: Key
    what: str


@dataclass
class Parsed:
    """value: dicts with text keys, lists, text, numbers, true or false, None, dates. lines: of every key."""

    value: Any = None
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str) -> Parsed:
    """Read one YAML document. Whatever is wrong with it is among the problems.

    A value that cannot be read is None and the others are there; of what cannot be parsed, nothing is.
    """
    parsed = Parsed()
    reader: _Reader | None = None
    try:
        if len(text) > MAX_CHARACTERS:
            raise _UnreadError(f"{len(text):,} characters; more than {MAX_CHARACTERS:,} are not read", 1)
        reader = _Reader(text, parsed)
        parsed.value = reader.document()
    except _UnreadError as error:
        parsed.problems.append(Problem(error.line, error.key, error.what))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not YAML: the character {visible(chr(error.character))} is not allowed"
        parsed.problems.append(Problem(line, (), what))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = shown(error.problem or error.context or "it cannot be parsed", 160)
        parsed.problems.append(Problem(mark.line + 1 if mark else 1, (), f"not YAML: {what}"))
    except (ValueError, OverflowError) as error:  # PyYAML's scanner, of an escape beyond Unicode or an endless version
        line = reader.loader.line + 1 if reader else 1
        parsed.problems.append(Problem(line, (), f"not YAML: {shown(error, 160)}"))
    return parsed


def front_matter(text: str) -> str | None:
    """The YAML between the `---` that a Markdown text begins with and the next one; None when there is none.

    White space may stand before it, as on the hub.
    """
    first, newline, rest = text.lstrip().partition("\n")
    closed = _CLOSED.search(rest) if first.rstrip() == "---" and newline else None
    return rest[: closed.start()] if closed else None


class _UnreadError(Exception):
    def __init__(self, what: str, line: int, key: Key = ()) -> None:
        super().__init__(what)
        self.what = what
        self.line = line
        self.key = key


class _Reader:
    """Values from PyYAML's events, whose depth and number stay within the limits with every alias written out."""

    def __init__(self, text: str, parsed: Parsed) -> None:
        self.loader = yaml.SafeLoader(text)
        self.parsed = parsed
        self.anchors: dict[str, Any] = {}
        self.open: set[str] = set()
        self.count = 0

    def document(self) -> Any:
        """The value of the only document, None when there is none."""
        self.loader.get_event()  # the stream begins
        if self.loader.check_event(StreamEndEvent):
            return None
        self.loader.get_event()  # the document begins
        value = self.value((), 1)
        self.loader.get_event()  # the document ends
        if not self.loader.check_event(StreamEndEvent):
            raise _UnreadError("a second document begins here; one is read", self._line(self.loader.peek_event()))
        return value

    def value(self, key: Key, depth: int) -> Any:
        """The next value, which stands below `key`."""
        event = self.loader.get_event()
        line = self._line(event)
        self.parsed.lines.setdefault(key, line)
        self._count(1, depth, line, key)
        if isinstance(event, AliasEvent):
            return self._named(event, key, depth)
        anchor = event.anchor
        if anchor is not None and (anchor in self.anchors or anchor in self.open):
            raise _UnreadError(f"the anchor `&{shown(anchor, 60)}` is given twice", line, key)
        if anchor is not None:
            self.open.add(anchor)
        value: Any
        if isinstance(event, ScalarEvent):
            value = self._scalar(event, key)
        elif isinstance(event, MappingStartEvent):
            self._check_tag(event, "map", key)
            value = self._mapping(key, depth)
        else:
            self._check_tag(event, "seq", key)
            value = []
            while not self.loader.check_event(SequenceEndEvent):
                value.append(self.value((*key, len(value)), depth + 1))
            self.loader.get_event()
        if anchor is not None:
            self.open.discard(anchor)
            self.anchors[anchor] = value
        return value

    def _mapping(self, key: Key, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, int] = {}
        while not self.loader.check_event(MappingEndEvent):
            event = self.loader.get_event()
            line = self._line(event)
            if not isinstance(event, ScalarEvent):
                raise _UnreadError("a key must be plain text, not a list, a section or an alias", line, key)
            name = event.value
            here = (*key, name)
            wrong = self._wrong_text(name)
            if name == "<<" and event.implicit[0]:
                wrong = "merge keys are not read; write the keys out"
            elif name in first:
                wrong = f"given twice, first in line {first[name]}"
            if wrong:
                self._problem(line, here, wrong)
                self.value(here, depth + 1)
                continue
            self.parsed.lines[here] = first[name] = line
            values[name] = self.value(here, depth + 1)
        self.loader.get_event()
        return values

    def _named(self, event: AliasEvent, key: Key, depth: int) -> Any:
        """A copy of what an alias stands for."""
        line, name = self._line(event), shown(event.anchor, 60)
        if event.anchor in self.open:
            raise _UnreadError(f"`*{name}` stands inside of what it names, which has no end", line, key)
        if event.anchor not in self.anchors:
            raise _UnreadError(f"`*{name}` names nothing above it", line, key)
        value = self.anchors[event.anchor]
        level, height = [value], 0
        while level:
            self._count(len(level), depth + height, line, key)
            height += 1
            level = [
                inner
                for outer in level
                if isinstance(outer, dict | list)
                for inner in (outer.values() if isinstance(outer, dict) else outer)
            ]
        return copy.deepcopy(value)

    def _count(self, added: int, depth: int, line: int, key: Key) -> None:
        self.count += added
        if depth > MAX_DEPTH:
            raise _UnreadError(f"nested more than {MAX_DEPTH} deep", line, key[:1])
        if self.count > MAX_VALUES:
            raise _UnreadError(f"more than {MAX_VALUES:,} values, those of aliases counted", line, key[:1])

    def _problem(self, line: int, key: Key, what: str) -> None:
        self.parsed.problems.append(Problem(line, key, what))

    def _scalar(self, event: ScalarEvent, key: Key) -> Any:
        """The value of a scalar; None and a problem where it has none."""
        text, tag = event.value, event.tag
        if tag is None or tag == "!":
            tag = self.loader.resolve(yaml.ScalarNode, text, event.implicit)
        kind = tag.removeprefix(_TAG)
        value: Any = None
        wrong: str | None = None
        if kind == "str":
            value, wrong = text, self._wrong_text(text)
        elif kind == "null" and text in _NULLS:
            pass
        elif kind == "bool" and text.lower() in _BOOLS:
            value = _BOOLS[text.lower()]
        elif kind == "int":
            value, wrong = _whole(text)
        elif kind == "float":
            value, wrong = _real(text)
        elif kind == "timestamp" and event.tag is None:
            try:
                value = self.loader.construct_yaml_timestamp(yaml.ScalarNode(tag, text))
            except ValueError:
                wrong = "is no date; if it is text, quote it"
        elif event.tag is None:  # a lone `=` or `<<`
            wrong = "has a meaning in YAML; if it is text, quote it"
        elif kind in ("null", "bool"):
            wrong = f"is no value for the tag `!!{kind}`"
        else:
            self._check_tag(event, "str", key)
        if wrong:
            self._problem(self._line(event), key, wrong if kind == "str" else f"`{shown(text, 60)}` {wrong}")
            return None
        return value

    @staticmethod
    def _wrong_text(text: str) -> str | None:
        found = _NO_TEXT.search(text)
        return f"the text holds the character {visible(found[0])}; leave it out" if found else None

    def _check_tag(self, event: Any, kind: str, key: Key) -> None:
        tag = event.tag
        if tag not in (None, "!", _TAG + kind):
            name = "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
            self._problem(self._line(event), key, f"the tag `{shown(name, 60)}` is not read; write a plain value")

    @staticmethod
    def _line(event: Any) -> int:
        return int(event.start_mark.line) + 1


def _whole(text: str) -> tuple[int | None, str | None]:
    """The whole number that a text stands for, or what is wrong with it."""
    plain = text.replace("_", "")
    if ":" in text:
        return None, _SIXTIETHS
    if _OCTAL.fullmatch(plain):
        return None, "is octal in YAML 1.1 and decimal in YAML 1.2; write it without the leading zero"
    if len(plain) > MAX_DIGITS:
        return None, f"has {len(plain):,} digits; more than {MAX_DIGITS} are not read"
    if not _WHOLE.fullmatch(plain):
        return None, "is no whole number"
    return int(plain, 0), None


def _real(text: str) -> tuple[float | None, str | None]:
    """The number that a text stands for, or what is wrong with it."""
    plain = text.replace("_", "")
    if plain.lower() in _NOT_FINITE:
        return _NOT_FINITE[plain.lower()], None
    if ":" in text:
        return None, _SIXTIETHS
    try:
        value = float(plain)
    except ValueError:
        return None, "is no number"
    return (value, None) if math.isfinite(value) else (None, "is beyond the range of numbers")
