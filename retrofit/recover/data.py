"""Text for calibration, recovery and evaluation: where it comes from, how it is split, which documents are measured.

Every source is split by whole document into `train` and `held_out`. Built-in corpora and the model's own samples
carry their split; of user text the last tenth of the documents is held out, of a hub dataset every tenth. One single
document is never used on both sides.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from retrofit.recover.corpora import BUILT_IN, Split, Text, built_in_texts
from retrofit.recover.files import HUB, kind_of, rows
from retrofit.recover.samples import Teacher, own_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress

OWN_SAMPLES = "self"
HELD_OUT_EVERY = 10


def check_sources(sources: Iterable[TextSource], *, teacher: bool = True) -> None:
    """Refuse missing, empty or unreadable text before any work: reads files whole, of a hub dataset the first row."""
    for source in sources:
        if source.source == OWN_SAMPLES:
            if not teacher:
                raise UserError(
                    "the model's own samples need the original model",
                    where="text source `self`",
                    fix="name another text source",
                )
        else:
            texts = read_texts(source, split="all")
            next(texts)
            if source.source not in BUILT_IN and not source.source.startswith(HUB):
                deque(texts, maxlen=0)  # a bad line far down would end the run hours later


def read_texts(
    source: TextSource,
    *,
    split: Split,
    teacher: Teacher | None = None,
    limit_chars: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Text]:
    """Documents of one side of a source, in a fixed order; empty documents are left out.

    teacher: the original model, needed for the source `self` only. limit_chars: stop reading user text after so much.
    Raises UserError for missing files, unknown keys, text that is not text, and sources without any text.
    The held-out side of a single document is empty.
    """
    if source.source in BUILT_IN:
        yield from built_in_texts(source.source, split)
        return
    if source.source == OWN_SAMPLES:
        if teacher is None:
            raise UserError("the model's own samples need the original model", where="text source `self`")
        read: Callable[[], Iterator[tuple[str, str]]] = own_samples(teacher, progress)
    else:
        _did_you_mean(source.source)
        read = rows(source)

    def filled() -> Iterator[tuple[str, str]]:
        return ((name, text) for name, text in read() if text.strip())

    kind = kind_of(source.source)
    size = 0
    found = False
    for name, text in _side(filled, split, source.source.startswith(HUB)):
        found = True
        yield Text(name, kind, text)
        size += len(text)
        if limit_chars is not None and size >= limit_chars:
            return
    if not found and (split != "held_out" or next(filled(), None) is None):
        raise UserError(
            "the text is empty", where=f"text source `{source.source}`", fix="give a file that holds some text"
        )


def require_known(ids_NT: torch.Tensor, folder: Path) -> None:
    """UserError when the tokenizer gave ids that the model in `folder` has no embedding for."""
    from retrofit.model.families import describe
    from retrofit.model.load import load_config

    size, largest = describe(load_config(folder)).vocab_size, int(ids_NT.max())
    if largest >= size:
        raise UserError(
            f"the tokenizer gives the token id {largest}, and the model knows ids below {size} (vocab_size)",
            where=str(folder),
            fix="put the tokenizer files that belong to these weights into the folder",
        )


def evaluation_texts(
    sources: Sequence[TextSource],
    count: int,
    min_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trained_on: Sequence[TextSource] = (),
    teacher: Teacher | None = None,
) -> list[tuple[str, str, str]]:
    """Up to `count` documents (name, kind, text) per source, each at least `min_tokens` tokens long.

    Built-in sources give their held-out side; user text its held-out side if it is in `trained_on` as well, else all.
    Raises UserError if a source has no such document, with the length of its longest, and if a file or folder lies
    inside a folder that is trained on, or around a file that is.
    """
    chosen: list[tuple[str, str, str]] = []
    for source in sources:
        split = _measured_side(source.source, [other.source for other in trained_on])
        documents: list[tuple[str, str, str]] = []
        longest = 0
        for text in read_texts(source, split=split, teacher=teacher):
            if len(documents) == count:
                break
            if len(text.text.encode()) < min_tokens - 1:  # a token covers a byte at least
                longest = max(longest, _length(text.text, tokenizer))
                continue
            length = _length(text.text, tokenizer)
            longest = max(longest, length)
            if length >= min_tokens:
                documents.append((text.name, text.kind, text.text))
        if not documents:
            raise UserError(
                f"no {'held-out ' if split == 'held_out' else ''}document is {min_tokens} tokens long; "
                f"the longest has {longest}",
                where=f"text source `{source.source}`",
                fix="give longer documents, or shorten `evaluate.lengths`",
            )
        chosen += documents
    return chosen


def _side(read: Callable[[], Iterator[tuple[str, str]]], split: Split, hub: bool) -> Iterator[tuple[str, str]]:
    """One side of user text: of a hub stream every tenth document is held out, otherwise the last tenth."""
    if split == "all":
        yield from read()
    elif hub:
        for number, row in enumerate(read(), 1):
            if (number % HELD_OUT_EVERY == 0) == (split == "held_out"):
                yield row
    else:
        total = sum(1 for _ in read())
        train = total - max(1, total // HELD_OUT_EVERY) if total > 1 else total
        yield from islice(read(), train) if split == "train" else islice(read(), train, None)


def _measured_side(source: str, trained_on: Sequence[str]) -> Split:
    """Which side of a source may be measured, given what was trained on; paths are compared by where they lead."""
    own = (*BUILT_IN, OWN_SAMPLES)
    if source in own or source in trained_on:
        return "held_out"
    if source.startswith(HUB):
        return "all"
    place = Path(source).expanduser().resolve()
    for other in trained_on:
        if other in own or other.startswith(HUB):
            continue
        trained = Path(other).expanduser().resolve()
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
    if source.startswith(HUB) or Path(source).expanduser().exists():
        return
    close = difflib.get_close_matches(source, [*BUILT_IN, OWN_SAMPLES], n=1)
    if close:
        raise UserError(
            f"no such text source: {source}", where=f"text source `{source}`", fix=f"did you mean `{close[0]}`?"
        )
