"""Text for calibration, recovery and evaluation: where it comes from, how it is split, mixed and packed.

Every source is split by whole document into `train` and `held_out`. Built-in corpora and the model's own samples
carry their split; of user text the last tenth of the documents is held out, of a hub dataset every tenth. One single
document is never used on both sides.
"""

from __future__ import annotations

import difflib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
CHARS_PER_TOKEN = 12  # generous: how much text is read for a number of tokens
SEGMENTS = 16  # no single document makes up more than this fraction of a source's share in one piece


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


@dataclass(frozen=True)
class Packed:
    """Rows of text packed end to end: token ids, and for each token the number of its document; both int64 [N, T]."""

    ids_NT: torch.Tensor
    documents_NT: torch.Tensor


def training_rows(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    sequence_length: int,
    seed: int,
    split: Split = "train",
    *,
    teacher: Teacher | None = None,
    repeat: bool = True,
    progress: Progress | None = None,
) -> Packed:
    """Packed rows [N, sequence_length], N = ceil(tokens / sequence_length), mixed by the sources' weights.

    Documents are cut into pieces, the pieces shuffled, and packed end to end as BOS, text, EOS; every sequence starts
    with BOS (if the tokenizer has one), as every context does later. Deterministic under `seed`.
    Text that does not suffice is read again, which is announced; with repeat=False it is a UserError that says how
    much there is. A source without held-out text is left out of that split, which is announced as well.
    """
    count = math.ceil(tokens / sequence_length)
    usable = [source for source in sources if not _is_bare(source, split, teacher, progress)]
    if not usable:
        raise UserError(
            "no text is left to hold out: a single document is used for training only",
            where=f"text source {', '.join(f'`{source.source}`' for source in sources)}",
            fix="add a second document, or a built-in source such as python-docs",
        )
    parts = []
    for index, (source, share) in enumerate(zip(usable, _shares(usable, count), strict=True)):
        if share:
            stream = _Stream(source, tokenizer, share, sequence_length, seed + 7919 * index, split, teacher, progress)
            parts.append(stream.pack(repeat))
    ids_NT, documents_NT = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.randperm(len(ids_NT), generator=torch.Generator().manual_seed(seed))
    return Packed(ids_NT[order], documents_NT[order])


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


class _Stream:
    """One source's share of a mix, tokenized piece by piece until the share is full."""

    def __init__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        sequences: int,
        sequence_length: int,
        seed: int,
        split: Split,
        teacher: Teacher | None,
        progress: Progress | None,
    ) -> None:
        self.source, self.tokenizer, self.progress = source, tokenizer, progress
        self.sequences, self.length, self.seed = sequences, sequence_length, seed
        wanted = sequences * sequence_length
        texts = read_texts(
            source, split=split, teacher=teacher, limit_chars=CHARS_PER_TOKEN * wanted, progress=progress
        )
        piece_chars = 4 * max(sequence_length, wanted // SEGMENTS)
        self.pieces = [piece for text in texts for piece in _pieces(text.text, piece_chars)]

    def pack(self, repeat: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, document numbers), both [sequences, length].

        Reads the pieces again in another order if they run out and `repeat` allows it.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = [] if bos is None else [bos]
        body = self.length - len(start)
        wanted = self.sequences * body
        ids: list[int] = []
        begins: list[int] = []  # where each piece starts; pieces are shuffled, so neighbours belong to other documents
        generator = torch.Generator().manual_seed(self.seed)
        passes = 0
        ended = False
        while len(ids) < wanted:
            if passes and not repeat:
                raise UserError(
                    f"too little text: {len(ids)} tokens, {wanted} needed",
                    where=f"text source `{self.source.source}`",
                    fix="ask for fewer tokens, or add text",
                )
            passes += 1
            before = len(ids)
            for index in torch.randperm(len(self.pieces), generator=generator).tolist():
                text, last = self.pieces[index]
                begins.append(len(ids))
                ids += start if ended else []
                ids += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                ids += [eos] if last and eos is not None else []
                ended = last
                if len(ids) >= wanted:
                    break
            if len(ids) == before:
                raise UserError("the text gives no tokens", where=f"text source `{self.source.source}`")
            if passes == 1 and len(ids) < wanted and repeat and self.progress is not None:
                self.progress.note(
                    f"{self.source.source}: {len(ids)} tokens of text for {wanted} tokens of training; "
                    f"it is read {wanted / len(ids):.1f} times"
                )
        rows_NT = torch.tensor(ids[:wanted], dtype=torch.int64).view(self.sequences, body)
        numbers = torch.searchsorted(torch.tensor(begins), torch.arange(wanted), right=True)
        documents_NT = numbers.view(self.sequences, body)
        if not start:
            return rows_NT, documents_NT
        rows_NT = torch.cat([torch.full((self.sequences, 1), bos, dtype=torch.int64), rows_NT], dim=1)
        return rows_NT, torch.cat([documents_NT[:, :1], documents_NT], dim=1)


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


def _pieces(text: str, chars: int) -> Iterator[tuple[str, bool]]:
    """Cut at line ends (or anywhere, if a line is too long) into (piece, is the document's last)."""
    start = 0
    while start < len(text):
        stop = start + chars
        if stop >= len(text):
            yield text[start:], True
            return
        newline = text.rfind("\n", start + chars // 2, stop)
        stop = newline + 1 if newline >= 0 else stop
        yield text[start:stop], False
        start = stop


def _shares(sources: Sequence[TextSource], count: int) -> list[int]:
    """`count` sequences split by weight; the largest remainders get what rounding leaves over."""
    total = sum(source.weight for source in sources)
    exact = [count * source.weight / total for source in sources]
    shares = [int(value) for value in exact]
    order = sorted(range(len(sources)), key=lambda i: (shares[i] - exact[i], i))
    for index in order[: count - sum(shares)]:
        shares[index] += 1
    return shares


def _is_bare(source: TextSource, split: Split, teacher: Teacher | None, progress: Progress | None) -> bool:
    """Whether a source has nothing to hold out; announced."""
    if split != "held_out" or next(read_texts(source, split=split, teacher=teacher, progress=progress), None):
        return False
    if progress is not None:
        progress.note(f"{source.source}: a single document, used for training only; nothing of it is held out")
    return True


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
