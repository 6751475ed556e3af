"""Text that is always at hand, split into train and held-out by whole document.

Two corpora come with every Python: `python-docs` is the interpreter's own reference (`pydoc_data.topics`),
`python-stdlib` the source of the standard library. Near-duplicates (a topic that is an excerpt of another, two copies
of one class) fall on the same side of the split, and the split depends on names alone, so it is the same in every
process. `short-prose` is five short pieces written for this project. All of it is held out: no step reads any.
`openings` are first lines written for this project, of many kinds of text, for samples of a model to begin with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from retrofit.data.dialogues import Dialogue
from retrofit.errors import UserError
from retrofit.recipe.values import OPENINGS, SHORT_PROSE

Split = Literal["train", "held_out", "all"]
MarksOf = Callable[[str], frozenset[str]]

OF_PYTHON = ("python-docs", "python-stdlib")
BUILT_IN = (*OF_PYTHON, SHORT_PROSE, OPENINGS)
DOCS_HELD_OUT = 0.36  # of the characters: one joined document of more than 16k tokens
STDLIB_HELD_OUT = 0.10
LONG_CHARS = 80_000  # a source file of 16k tokens or more
PHRASE = 8  # words
OVERLAP = 0.15  # share of the shorter text's marks that makes two texts one group
EXCERPT = 0.8  # share of a text's marks found in one longer text that makes it an excerpt of it
COMMON = 40  # a mark that more documents than this share (a license header) says nothing
_PROSE = Path(__file__).with_name("short_prose.txt")
_OPENINGS = Path(__file__).with_name("openings.txt")
OPENINGS_HELD_OUT = 0.25
SKIPPED_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}
)


@dataclass(frozen=True)
class Text:
    """One document. name: unique within its source. kind: the source's name as it stands in metrics.

    dialogue: where it is one; `text` is then what its turns say.
    """

    name: str
    kind: str
    text: str
    dialogue: Dialogue | None = None


def built_in_texts(source: str, split: Split) -> Iterator[Text]:
    """Documents of a built-in corpus, in a fixed order.

    The held-out part of `python-docs` is one joined document, so that long contexts can be measured on it; so is all of
    `short-prose`.
    """
    texts, held_out = _corpus(source)
    if source != "python-docs":
        yield from (Text(name, source, text) for name, text in select(texts, held_out, split).items())
        return
    if split in ("train", "all"):
        yield from (Text(name, source, text) for name, text in select(texts, held_out, "train").items())
    if split in ("held_out", "all"):
        joined = select(texts, held_out, "held_out")
        yield Text(f"held-out topics, {len(joined)} joined", source, "\n\n".join(joined.values()))


def built_in_digest(source: str) -> str:
    """sha256 of the names and texts of a built-in corpus: distributions change them under one version of Python."""
    digest = hashlib.sha256()
    for name, text in _corpus(source)[0].items():
        digest.update(json.dumps([name, text]).encode())
    return digest.hexdigest()


@functools.cache
def built_in_bytes(source: str) -> int:
    """About how many bytes a built-in corpus has to train on; 0 where there are none. Files are not read."""
    if source in (SHORT_PROSE, OPENINGS):
        return 0
    if source == "python-stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in root.rglob("*.py") if not SKIPPED_PARTS.intersection(path.relative_to(root).parts)]
        return int(sum(path.stat().st_size for path in files) * (1 - STDLIB_HELD_OUT))
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return 0
    return int(sum(len(str(text)) for text in topics.values()) * (1 - DOCS_HELD_OUT))


@functools.cache
def _corpus(source: str) -> tuple[Mapping[str, str], frozenset[str]]:
    """(texts by name, names of those held out): nothing but this Python and this program decides about them."""
    if source == SHORT_PROSE:
        name = "five pieces, joined"
        return {name: _PROSE.read_text(encoding="utf-8")}, frozenset({name})
    if source == OPENINGS:
        lines = {f"opening {n}": line for n, line in enumerate(_OPENINGS.read_text("utf-8").splitlines(), 1)}
        return lines, frozenset(list(lines)[round(len(lines) * (1 - OPENINGS_HELD_OUT)) :])
    if source == "python-stdlib":
        texts = stdlib_texts()
        return texts, stdlib_held_out(texts)
    texts = docs_texts()
    return texts, docs_held_out(texts)


def select(texts: Mapping[str, str], held_out: frozenset[str], split: Split) -> dict[str, str]:
    """The documents of one side of a split, by name."""
    if split == "all":
        return dict(texts)
    return {name: text for name, text in texts.items() if (name in held_out) == (split == "held_out")}


def docs_texts() -> dict[str, str]:
    """Topics of the Python reference by name, without those that are excerpts of a longer one."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "this Python carries no documentation topics (module pydoc_data is missing)",
            where="text source `python-docs`",
            fix="install the full standard library of this Python, or use `python-stdlib` or a file of your own",
        ) from error
    return without_excerpts({name: str(topics[name]) for name in sorted(topics)}, phrases)


def stdlib_texts() -> dict[str, str]:
    """Source files of the standard library by path; tests, character tables and build data are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few files declare another encoding; they are not worth a decoder
            continue
        if len(text) >= 200:
            texts[relative.as_posix()] = text
    if not texts:
        raise UserError(
            "this Python carries no source of its standard library",
            where=str(root),
            fix="use `python-docs` or a file of your own as text",
        )
    return texts


def docs_held_out(texts: Mapping[str, str]) -> frozenset[str]:
    """Names of the held-out topics: groups in hash order for as long as they fit into the held-out share."""
    room = DOCS_HELD_OUT * sum(map(len, texts.values()))
    held_out: set[str] = set()
    for group in sorted(groups(texts, phrases), key=_group_hash):
        size = sum(len(texts[name]) for name in group)
        if size <= room:
            held_out.update(group)
            room -= size
    return frozenset(held_out)


def stdlib_held_out(texts: Mapping[str, str]) -> frozenset[str]:
    """Names of the held-out files: a tenth of the groups, and a third of those that hold a long file."""
    every = sorted(groups(texts, lines), key=_group_hash)
    long = [group for group in every if any(len(texts[name]) > LONG_CHARS for name in group)]
    short = [group for group in every if group not in long]
    chosen = long[: max(1, len(long) // 3)]
    chosen += [group for group in short if _group_hash(group) < STDLIB_HELD_OUT]
    return frozenset(name for group in chosen for name in group)


def without_excerpts(texts: Mapping[str, str], marks_of: MarksOf) -> dict[str, str]:
    """The texts without those whose marks nearly all stand in one longer text."""
    marks = {name: marks_of(text) for name, text in texts.items()}
    dropped: set[str] = set()
    for (first, second), shared in _shared(marks).items():
        shorter, longer = sorted((first, second), key=lambda name: (len(texts[name]), name))
        if longer not in dropped and shared >= EXCERPT * len(marks[shorter]):
            dropped.add(shorter)
    return {name: text for name, text in texts.items() if name not in dropped}


def groups(texts: Mapping[str, str], marks_of: MarksOf) -> list[tuple[str, ...]]:
    """Texts joined into groups by shared marks (single linkage), so that a split never parts near-duplicates."""
    marks = {name: marks_of(text) for name, text in texts.items()}
    parent = {name: name for name in texts}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for (first, second), shared in _shared(marks).items():
        if shared >= OVERLAP * min(len(marks[first]), len(marks[second])):
            parent[root(first)] = root(second)
    members: dict[str, list[str]] = {}
    for name in sorted(texts):
        members.setdefault(root(name), []).append(name)
    return [tuple(group) for group in members.values()]


def stable_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _group_hash(group: Sequence[str]) -> float:
    return stable_fraction(group[0])


def lines(text: str) -> frozenset[str]:
    """Distinct lines long enough to identify a text, without their indentation: the marks of code."""
    return frozenset(line for line in map(str.strip, text.splitlines()) if len(line) >= 24)


def phrases(text: str) -> frozenset[str]:
    """Distinct runs of PHRASE words, however the lines are broken: the marks of prose."""
    words = text.split()
    return frozenset(" ".join(words[i : i + PHRASE]) for i in range(max(1, len(words) - PHRASE + 1)))


def _shared(marks: Mapping[str, frozenset[str]]) -> dict[tuple[str, str], int]:
    """Number of shared marks of every pair of texts that shares any, in a fixed order."""
    holders: dict[str, list[str]] = {}
    for name in sorted(marks):
        for mark in marks[name]:
            holders.setdefault(mark, []).append(name)
    counts: Counter[tuple[str, str]] = Counter()
    for names in holders.values():
        if 1 < len(names) <= COMMON:
            counts.update(combinations(names, 2))
    return dict(sorted(counts.items()))
