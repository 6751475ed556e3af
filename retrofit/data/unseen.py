"""Documents that are measured and were not trained on, recognised by their content, whatever they are called.

What stands in training text as well, as a copy, an excerpt or with small changes, is not measured, and a document is
measured once. Both are reported. The built-in corpora have been split with the same care (`corpora`): their held-out
side is not compared with their own train side again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from retrofit.data.corpora import BUILT_IN, Text
from retrofit.data.overlap import NEAR, Overlap, content
from retrofit.errors import UserError
from retrofit.escape import shown

TOLD = 0.1
"""Share of what is measured of a document from which on it is reported as trained on."""
_GROWTH = 16  # where documents fall away, so many times more are looked at next
_NAMED = 3  # documents that a note names


@dataclass(frozen=True)
class Candidate:
    """A document that may be measured. beginning: as much of it as is scored."""

    text: Text
    beginning: str


@dataclass(frozen=True)
class Reading:
    """Text that was read in training. kind: its name in results. texts: how to read it."""

    kind: str
    texts: Callable[[], Iterable[str]]


@dataclass
class Chosen:
    """What became of the documents of one source. trained: (name, share, kind of text that it stands in). repeated:
    (name, name of the document that it is a copy of). partly: as trained, of what is measured all the same."""

    documents: list[Text] = field(default_factory=list)
    trained: list[tuple[str, float, str]] = field(default_factory=list)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    partly: list[tuple[str, float, str]] = field(default_factory=list)

    @property
    def stands_in(self) -> set[str]:
        """Kinds of read text that hold some of what is, or would be, measured."""
        return {kind for _, _, kind in (*self.trained, *self.partly)}

    def notes(self, kind: str) -> list[str]:
        """What a person should know of it."""
        notes = []
        if self.trained:
            notes.append(f"`{shown(kind)}`: {_documents(len(self.trained))} not measured, because {self.why()}")
        if self.repeated:
            pairs = (f"{shown(name, 80)} of {shown(first, 80)}" for name, first in self.repeated[:_NAMED])
            notes.append(
                f"`{shown(kind)}`: {_documents(len(self.repeated))} left out as copies of others that are measured: "
                f"{', '.join(pairs)}{_more(self.repeated)}"
            )
        if self.partly:
            parts = (f"{share:.0%} of {shown(name, 80)} in `{shown(by)}`" for name, share, by in self.partly[:_NAMED])
            notes.append(
                f"`{shown(kind)}`: parts of what is measured were trained or calibrated on: "
                f"{', '.join(parts)}{_more(self.partly)}"
            )
        return notes

    def why(self) -> str:
        """Which documents were trained on, and where they stand."""
        named = (f"{shown(name, 80)} ({share:.0%} in `{shown(by)}`)" for name, share, by in self.trained[:_NAMED])
        return f"text that was trained or calibrated on holds it: {', '.join(named)}{_more(self.trained)}"


@dataclass
class Findings:
    """What was found out while documents were chosen. notes: for people. shared: by kind of measured text, the kinds of
    read text that hold some of it."""

    notes: list[str] = field(default_factory=list)
    shared: dict[str, set[str]] = field(default_factory=dict)

    def add(self, kind: str, chosen: Chosen, source: str | None = None) -> None:
        """Of the documents of one kind. source: what people call it, where that is not the kind."""
        self.notes += chosen.notes(source or kind)
        if chosen.stands_in:
            self.shared.setdefault(kind, set()).update(chosen.stands_in)


def choose(streams: Sequence[Iterator[Candidate]], counts: Sequence[int], readings: Sequence[Reading]) -> list[Chosen]:
    """Of each stream the first documents, as many as `counts` has for it, that stand in none of `readings` and were not
    chosen before."""
    chosen = [Chosen() for _ in streams]
    first: dict[bytes, str] = {}
    waiting, growth = list(range(len(streams))), 1
    while waiting:
        new: list[tuple[int, Candidate]] = []
        ended = set()
        for index in waiting:
            take = growth * counts[index]
            some = list(islice(streams[index], take))
            new += [(index, candidate) for candidate in some]
            if len(some) < take:
                ended.add(index)
        for (index, candidate), (share, kind) in zip(new, found_in([one for _, one in new], readings), strict=True):
            known, name = chosen[index], candidate.text.name
            if len(known.documents) == counts[index]:
                continue
            if share >= NEAR:
                known.trained.append((name, share, kind))
            elif (digest := content(candidate.text.text)) in first:
                known.repeated.append((name, first[digest]))
            else:
                first[digest] = name
                known.documents.append(candidate.text)
                if share >= TOLD:
                    known.partly.append((name, share, kind))
        waiting = [index for index in waiting if index not in ended and len(chosen[index].documents) < counts[index]]
        growth *= _GROWTH
    return chosen


def found_in(candidates: Sequence[Candidate], readings: Sequence[Reading]) -> list[tuple[float, str]]:
    """Of each candidate the share that stands in the readings, (of its beginning or of all of it, the larger), and the
    kind of text that holds most of that."""
    found = [(0.0, "")] * len(candidates)
    ours = [candidate.text.kind in BUILT_IN for candidate in candidates]
    user = [reading for reading in readings if reading.kind not in BUILT_IN]
    own = [reading for reading in readings if reading.kind in BUILT_IN] if not all(ours) else []
    if not candidates or not (user or own):
        return found
    overlap = Overlap([*(one.beginning for one in candidates), *(one.text.text for one in candidates)])
    before, largest = [0.0] * len(candidates), [0.0] * len(candidates)
    for reading in (*user, *own):
        overlap.see(reading.texts())
        shares = overlap.shares()
        for index, both in enumerate(zip(shares[: len(candidates)], shares[len(candidates) :], strict=True)):
            if ours[index] and reading in own:
                continue
            share = max(both)
            grown, before[index] = share - before[index], share
            if grown > largest[index]:
                largest[index] = grown
                found[index] = (share, reading.kind)
            else:
                found[index] = (share, found[index][1])
    return found


def without_repeats(texts: Mapping[str, Sequence[Text]]) -> tuple[dict[str, frozenset[str]], list[str]]:
    """({kind: names of the documents to read}, notes) of text that is fitted to and checked on, so that nothing stands
    in it twice: of copies the first stays, of a text and its excerpt the longer. Built-in corpora are left as they are.

    Raises UserError where nothing is left of a kind.
    """
    user = [kind for kind in texts if kind not in BUILT_IN]
    if not user:
        return {}, []
    every = [text for some in texts.values() for text in some]
    ordered = sorted(every, key=lambda text: (text.kind not in BUILT_IN, -len(text.text)))
    overlap = Overlap([text.text for text in ordered])
    overlap.see(text.text for text in ordered)
    shares = overlap.shares(before=range(len(ordered)))
    left_out: dict[str, list[str]] = {kind: [] for kind in user}
    for text, share in zip(ordered, shares, strict=True):
        if text.kind in left_out and share >= NEAR:
            left_out[text.kind].append(text.name)
    notes = []
    for kind, names in left_out.items():
        if not names:
            continue
        listed = f"{', '.join(shown(name, 80) for name in sorted(names)[:_NAMED])}{_more(names)}"
        if len(names) == len(texts[kind]):
            raise UserError(
                f"all of it stands in other text as well ({listed})",
                where=f"text source `{shown(kind)}`",
                fix="leave it out",
            )
        notes.append(
            f"`{shown(kind)}`: {_documents(len(names))} not read, as other text that is read holds it: {listed}"
        )
    return {
        kind: frozenset(text.name for text in texts[kind] if text.name not in set(names))
        for kind, names in left_out.items()
        if names
    }, notes


def _documents(count: int) -> str:
    return "1 document was" if count == 1 else f"{count:,} documents were"


def _more(items: Sequence[object]) -> str:
    return f" and {len(items) - _NAMED:,} more" if len(items) > _NAMED else ""
