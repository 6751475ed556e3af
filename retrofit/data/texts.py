"""Text for calibration, recovery and evaluation: where it comes from, how it is split, which documents are measured.

Every source is split by whole document into `train` and `held_out`. Built-in corpora carry their split, the model's own
samples are written for each side; of user text the last tenth of the documents is held out, of a hub dataset every
tenth. One single document is never used on both sides.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from retrofit.data.corpora import BUILT_IN, Split, Text, built_in_texts
from retrofit.data.folders import walk
from retrofit.data.overlap import NEAR
from retrofit.data.samples import OwnSamples, Teacher
from retrofit.data.sources import (
    HUB,
    MADE,
    OURS,
    OWN_SAMPLES,
    SYNTHETIC,
    Row,
    holds_dialogues,
    kind_of,
    place_of,
    rows,
    side,
)
from retrofit.data.unseen import Candidate, Chosen, Findings, Reading, choose, found_in, without_repeats
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import local_path
from retrofit.recipe.schema import TextSource
from retrofit.system.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.model.folder import ModelFolder

_HUB_CHARS = 1 << 25  # most of a hub dataset that is fetched to compare with
_SPARE = 4  # times what is read is looked through, so that there is enough where documents are left out


def check_sources(sources: Iterable[TextSource], *, teacher: bool = True) -> tuple[str, ...]:
    """Refuse missing, empty or unreadable text before any work: reads files whole, of a hub dataset the first row.

    Returns notes on what is left out: hidden files, files of other kinds, rows without text.
    """
    notes: list[str] = []
    for source in sources:
        if source.source == OWN_SAMPLES:
            if not teacher:
                raise UserError(
                    "the model's own samples need the original model",
                    where="text source `self`",
                    fix="name another text source",
                )
            notes += check_sources(TextSource.model_validate(prompt.model_dump()) for prompt in source.prompts)
        elif source.source == SYNTHETIC:
            next(built_in_texts("python-docs", "train"))
        elif source.source in BUILT_IN or source.source.startswith(HUB):
            next(read_texts(source, split="all"))
            holds_dialogues(source)  # asked once, and not of the hub after hours of work
        else:
            notes += _check_files(source)
    return tuple(notes)


def _check_files(source: TextSource) -> list[str]:
    """Read all of a file or folder: a bad line far down would end the run hours later."""
    _did_you_mean(source.source)
    found = empty = 0
    for row in rows(source)():
        found += 1
        empty += not _is_filled(row)
    if found == empty:
        raise _is_empty(source)
    kind, root = shown(kind_of(source.source)), local_path(source.source)
    left_out = walk(root).left_out() if root.is_dir() else ""
    notes = [f"`{kind}`: not read as text: {left_out}"] if left_out else []
    return [*notes, f"`{kind}`: {empty:,} of {found:,} documents are empty and left out"] if empty else notes


def read_texts(
    source: TextSource,
    *,
    split: Split,
    teacher: Teacher | None = None,
    limit_chars: int | None = None,
    only: frozenset[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[Text]:
    """Documents of one side of a source, in a fixed order; empty documents are left out.

    teacher: the original model, needed for the source `self` only. limit_chars: stop reading user text after so much.
    only: names of the documents of user text to give.
    Raises UserError for missing files, unknown keys, text that is not text, and sources without any text.
    The held-out side of a single document is empty.
    """
    if source.source in BUILT_IN:
        yield from built_in_texts(source.source, split)
        return
    if source.source == OWN_SAMPLES:
        if teacher is None:
            raise UserError("the model's own samples need the original model", where="text source `self`")
        for samples in own_samples(source, teacher, split):
            samples.write(progress=progress)
            yield from (Text(name, OWN_SAMPLES, text) for name, text in samples.documents() if text.strip())
        return
    _did_you_mean(source.source)
    read = rows(source)

    def filled() -> Iterator[Row]:
        return filter(_is_filled, read())

    kind = kind_of(source.source)
    size = 0
    found = False
    for name, text, dialogue in side(filled, split, source.source.startswith(HUB)):
        found = True
        if only is not None and name not in only:
            continue
        yield Text(name, kind, text, dialogue)
        size += len(text)
        if limit_chars is not None and size >= limit_chars:
            return
    if not found and (split != "held_out" or next(filled(), None) is None):
        raise _is_empty(source)


def _is_filled(row: Row) -> bool:
    """Whether there is something to read: a dialogue may be calls of tools alone."""
    return row.dialogue is not None or bool(row.text.strip())


def own_samples(source: TextSource, teacher: Teacher, split: Split) -> tuple[OwnSamples, ...]:
    """What the original model writes on one side of a source `self`, or on both."""
    sides: dict[Split, tuple[Literal["train", "held_out"], ...]] = {
        "train": ("train",),
        "held_out": ("held_out",),
        "all": ("train", "held_out"),
    }
    return tuple(OwnSamples(teacher, source, side) for side in sides[split])


def write_samples(
    sources: Iterable[TextSource], teacher: Teacher, splits: Sequence[Split], world: World, progress: Progress | None
) -> None:
    """Have the original model write what these sources want of it; every process samples its share."""
    for source in sources:
        if source.source == OWN_SAMPLES:
            for samples in (one for split in splits for one in own_samples(source, teacher, split)):
                samples.write(world, progress)


def _is_empty(source: TextSource) -> UserError:
    return UserError(
        "the text is empty",
        where=f"text source `{shown(source.source)}`",
        fix="give a file that holds some text",
    )


def require_known(ids_NT: torch.Tensor, folder: str | Path | ModelFolder) -> None:
    """UserError when the tokenizer gave ids that the model in `folder` has no embedding for."""
    from retrofit.model.folder import opened

    model = opened(folder)
    size, largest = model.spec.vocab_size, int(ids_NT.max())
    if largest >= size:
        raise UserError(
            f"the tokenizer gives the token id {largest}, and the model knows ids below {size} (vocab_size)",
            where=str(model.path),
            fix="put the tokenizer files that belong to these weights into the folder",
        )


def evaluation_texts(
    sources: Sequence[TextSource],
    count: int,
    min_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trained_on: Sequence[TextSource] = (),
    also_read: Sequence[TextSource] = (),
    teacher: Teacher | None = None,
    read_chars: int | None = None,
    findings: Findings | None = None,
) -> list[tuple[str, str, str]]:
    """Up to `count` documents (name, kind, text) per source, each at least `min_tokens` tokens long, of which so many
    are scored.

    Built-in sources give their held-out side; user text its held-out side if it is in `trained_on` as well, else all.
    What stands in the train side of `trained_on` or `also_read`, by its content, is left out, and so are copies of what
    is measured already. read_chars: as much as training reads of a source at most. findings: gets what was found
    of that.
    Raises UserError if a source has no such document, with the length of its longest, if nothing is left of it, and if
    a file or folder lies inside a folder that is trained on, or around a file that is.
    """
    splits = [measured_side(source.source, [other.source for other in trained_on]) for source in sources]
    longest = [0] * len(sources)

    def long_enough(index: int) -> Iterator[Candidate]:
        for text in read_texts(sources[index], split=splits[index], teacher=teacher):
            short = len(text.text.encode()) < min_tokens - 1  # a token covers a byte at least
            if short and longest[index] >= min_tokens:
                continue
            length = _length(text.text, tokenizer)
            longest[index] = max(longest[index], length)
            if not short and length >= min_tokens:
                yield Candidate(text, text.text[: math.ceil(len(text.text) * min_tokens / length)])

    readings = readings_of((*trained_on, *also_read), read_chars)
    found = choose([long_enough(index) for index in range(len(sources))], [count] * len(sources), readings)
    kinds = [kind_of(source.source) for source in sources]
    measured = {kind for kind, one in zip(kinds, found, strict=True) if one.documents}
    for index, (source, split, one) in enumerate(zip(sources, splits, found, strict=True)):
        if one.documents or (one.repeated and kinds[index] in measured):  # a source that is named twice
            if findings is not None:
                findings.add(kinds[index], one)
            continue
        where = f"text source `{shown(source.source)}`"
        if one.trained:
            raise UserError(
                f"nothing is left to measure: {one.why()}", where=where, fix="measure on text that is not trained on"
            )
        if one.repeated:
            raise UserError(
                f"every document is a copy of one that is measured already ({shown(one.repeated[0][1], 80)})",
                where=where,
                fix="leave it out",
            )
        if split == "held_out" and not longest[index]:
            raise UserError(
                "no document of it is held out: all of it is trained or calibrated on",
                where=where,
                fix="measure on other text, or give this source more documents",
            )
        raise UserError(
            f"no {'held-out ' if split == 'held_out' else ''}document is {min_tokens} tokens long; "
            f"the longest has {longest[index]}",
            where=where,
            fix="give longer documents, or shorten `evaluate.lengths`",
        )
    return [(text.name, text.kind, text.text) for one in found for text in one.documents]


def unseen_held_out(
    sources: Sequence[TextSource], *, train_chars: int, held_out_chars: int
) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
    """({kind: names of its held-out documents that no source trains on}, notes), for the kinds that are user text.

    train_chars, held_out_chars: how much of a source each side reads at most.
    """
    readings = readings_of(sources, train_chars)
    if all(reading.kind in BUILT_IN for reading in readings):
        return {}, ()
    texts = [
        Candidate(text, text.text)
        for source in sources
        if source.source not in MADE
        for text in read_texts(source, split="held_out", limit_chars=_SPARE * held_out_chars)
    ]
    seen: dict[str, list[tuple[str, float, str]]] = {}
    for one, (share, by) in zip(texts, found_in(texts, readings), strict=True):
        if share >= NEAR:
            seen.setdefault(one.text.kind, []).append((one.text.name, share, by))
    only: dict[str, frozenset[str]] = {}
    for kind in dict.fromkeys(one.text.kind for one in texts):
        if kind in seen or kind not in BUILT_IN:
            left_out = {name for name, *_ in seen.get(kind, ())}
            only[kind] = frozenset(one.text.name for one in texts if one.text.kind == kind) - left_out
    notes = (f"held-out text of {Chosen(trained=some).notes(kind)[0]}" for kind, some in seen.items())
    return only, tuple(notes)


def distinct_texts(
    sources: Sequence[TextSource], *, limit_chars: Callable[[TextSource], int]
) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
    """({kind: names of the training documents to read}, notes), so that no text stands in user text twice.

    limit_chars: how much of a source is read. Raises UserError where nothing is left of a source.
    """
    texts = {
        kind_of(source.source): list(read_texts(source, split="train", limit_chars=_SPARE * limit_chars(source)))
        for source in sources
        if source.source not in MADE and any(other.source not in OURS for other in sources)
    }
    only, notes = without_repeats(texts)
    return only, tuple(notes)


def readings_of(sources: Sequence[TextSource], limit_chars: int | None) -> list[Reading]:
    """The train sides to compare with. The model's own samples are new text."""

    def texts(source: TextSource) -> Callable[[], Iterator[str]]:
        limit = min(limit_chars or _HUB_CHARS, _HUB_CHARS) if source.source.startswith(HUB) else limit_chars
        return lambda: (text.text for text in read_texts(source, split="train", limit_chars=limit))

    return [
        Reading(kind_of(source.source), texts(source)) for source in dict.fromkeys(sources) if source.source not in MADE
    ]


def measured_side(source: str, trained_on: Sequence[str]) -> Split:
    """Which side of a source may be measured, given what was trained on; paths are compared by where they lead."""
    if source in OURS or source in trained_on:
        return "held_out"
    if source.startswith(HUB):
        return "all"
    place = place_of(source)
    for other in trained_on:
        if other in OURS or other.startswith(HUB):
            continue
        trained = place_of(other)
        if trained == place:
            return "held_out"
        if trained in place.parents or place in trained.parents:
            raise UserError(
                f"this text and `{other}`, which is trained or calibrated on, hold the same documents",
                where=f"text source `{source}`",
                fix=f"measure on `{other}` itself (its held-out part is taken), or on other text",
            )
    return "all"


def _length(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text with the BOS that scoring puts before it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return len(ids) + (tokenizer.bos_token_id is not None)


def _did_you_mean(source: str) -> None:
    """Name the built-in source that a misspelt word is close to."""
    if source.startswith(HUB) or os.path.lexists(local_path(source)):
        return
    close = difflib.get_close_matches(source, OURS, n=1)
    if close:
        raise UserError(
            f"no such text source: {source}", where=f"text source `{source}`", fix=f"did you mean `{close[0]}`?"
        )
