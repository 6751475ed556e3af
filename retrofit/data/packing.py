"""Rows of text for calibration and recovery: sources mixed by weight, cut into pieces, shuffled, packed end to end."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from retrofit.data.chat_rows import chat_rows
from retrofit.data.chat_tokens import rendered_text
from retrofit.data.corpora import Split, Text
from retrofit.data.long_rows import LONG_ROW, long_rows
from retrofit.data.samples import Teacher
from retrofit.data.sources import OWN_SAMPLES, SYNTHETIC, kind_of
from retrofit.data.synthetic import synthetic_rows
from retrofit.data.texts import read_texts
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import LossOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress

CHARS_PER_TOKEN = 12  # generous: how much text is read for a number of tokens
SEGMENTS = 16  # no single document makes up more than this fraction of a source's share in one piece


@dataclass(frozen=True)
class Packed:
    """Rows of text packed end to end: token ids, and for each token the number of its document; both int64 [N, T].

    notes: what is odd about the text. read: how much of each source it is. counted_NT: bool, whether a loss counts what
    follows a token; None where it counts every token.
    """

    ids_NT: torch.Tensor
    documents_NT: torch.Tensor
    notes: tuple[str, ...] = ()
    counted_NT: torch.Tensor | None = None
    read: tuple[str, ...] = ()


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
    only: Mapping[str, frozenset[str]] | None = None,
    loss_on: LossOn | None = None,
    one_document: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Packed rows [N, sequence_length], N = ceil(tokens / sequence_length), mixed by the sources' weights.

    Documents are cut into pieces, the pieces shuffled, and packed end to end as BOS, text, EOS; every sequence starts
    with BOS (if the tokenizer has one), as every context does later. Deterministic under `seed`.
    Text that does not suffice is read again, which is announced; with repeat=False it is a UserError that says how
    much there is. A source without held-out text is left out of that split, which is announced as well.
    only: by kind of text, the names of the documents to read, where not all are. loss_on: for training on dialogues,
    which then stay whole, in rows of their own (`chat_rows`); without it they are text as the chat template writes it.
    In training, rows of LONG_ROW tokens or more are one document each where one is long enough (`long_rows`), and with
    one_document all rows.
    """
    count = math.ceil(tokens / sequence_length)
    chosen = {source: (only or {}).get(kind_of(source.source)) for source in sources}
    usable = [source for source in sources if not is_bare(source, split, teacher, chosen[source], progress)]
    if not usable:
        raise UserError(
            "no text is left to hold out: a single document is used for training only",
            where=f"text source {', '.join(f'`{source.source}`' for source in sources)}",
            fix="add a second document, or a built-in source such as python-docs",
        )
    parts, notes, read = [], [], []
    for index, (source, share) in enumerate(zip(usable, _shares(usable, count), strict=True)):
        if not share:
            continue
        own, kind = seed + 7919 * index, kind_of(source.source)
        if source.source == SYNTHETIC:
            made = synthetic_rows(tokenizer, share, sequence_length, own, split=split)
            answers = made.counted_NT if loss_on == "assistant" else torch.ones_like(made.counted_NT)
            parts.append((made.ids_NT, torch.arange(share)[:, None].expand_as(made.ids_NT), answers))
            read.append(f"`{kind}`: the loss counts {int(answers.sum()):,} of {answers.numel():,} tokens")
            continue
        limit = CHARS_PER_TOKEN * share * sequence_length
        reading = {"limit_chars": limit, "only": chosen[source], "progress": progress}
        texts = list(read_texts(source, split=split, teacher=teacher, **reading))  # type: ignore[arg-type]
        notes += spelled_tokens(kind, (text.text for text in texts), tokenizer)
        if loss_on and texts and texts[0].dialogue is not None:
            packed = chat_rows(texts, tokenizer, share, sequence_length, own, loss_on=loss_on, kind=kind)
            parts.append((packed.ids_NT, packed.documents_NT, packed.counted_NT))
            read.append(packed.notes[0])  # how much of it is read; the others say what is not
            notes += packed.notes[1:]
        else:
            rows = share
            if (one_document or (loss_on and sequence_length >= LONG_ROW)) and kind != OWN_SAMPLES:
                long = long_rows(texts, tokenizer, share, sequence_length, own)
                one_NT = long.documents_N[:, None].expand_as(long.ids_NT)
                parts.append((long.ids_NT, one_NT, torch.ones_like(one_NT, dtype=torch.bool)))
                notes.append(long.note(kind, share, sequence_length))
                rows, texts = share - len(long.ids_NT), list(long.rest)
            if rows:
                stream = _Stream(source, texts, tokenizer, rows, sequence_length, own, progress)
                packed_rows = stream.pack(repeat)
                parts.append((*packed_rows, torch.ones_like(packed_rows[0], dtype=torch.bool)))
                if loss_on and stream.read > 1:
                    read.append(f"`{shown(kind, 60)}`: its text is read {stream.read:.1f} times")
        if loss_on and len(usable) > 1:
            read.append(f"`{shown(kind, 60)}`: {share:,} of {count:,} rows")
    ids_NT, documents_NT, counted_NT = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.randperm(len(ids_NT), generator=torch.Generator().manual_seed(seed))
    counted = None if bool(counted_NT.all()) else counted_NT[order]
    return Packed(ids_NT[order], documents_NT[order], tuple(notes), counted, tuple(read))


def spelled_tokens(kind: str, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note where texts spell special tokens: a tokenizer reads `</s>` as the end of a text, not as letters. Those of
    the model's own samples are meant."""
    if kind == OWN_SAMPLES:
        return []
    special = [token for token in tokenizer.all_special_tokens if token and not token.isspace()]
    if not special:
        return []
    pattern = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
    found = Counter(match for text in texts for match in pattern.findall(text))
    if not found:
        return []
    named = ", ".join(f"{shown(token, 40)} {_times(count)}" for token, count in found.most_common(3))
    return [f"`{shown(kind)}` spells special tokens, which are read as such and not as text: {named}"]


class _Stream:
    """One source's share of a mix, tokenized piece by piece until the share is full."""

    def __init__(
        self,
        source: TextSource,
        texts: Sequence[Text],
        tokenizer: PreTrainedTokenizerBase,
        sequences: int,
        sequence_length: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.source, self.tokenizer, self.progress = source, tokenizer, progress
        self.sequences, self.length, self.seed = sequences, sequence_length, seed
        piece_chars = 4 * max(sequence_length, sequences * sequence_length // SEGMENTS)
        self.dialogues = bool(texts) and texts[0].dialogue is not None  # whose template writes how they begin and end
        given = rendered_text(texts, tokenizer) if self.dialogues else [text.text for text in texts]
        self.pieces = [piece for text in given for piece in _pieces(text, piece_chars)]
        self.read = 1.0  # how often, at most once unless more is known

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
                ids += start if ended and not self.dialogues else []
                ids += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                ids += [eos] if last and eos is not None and not self.dialogues else []
                ended = last
                if len(ids) >= wanted:
                    break
            if len(ids) == before:
                raise UserError("the text gives no tokens", where=f"text source `{self.source.source}`")
            if passes == 1 and len(ids) < wanted and repeat:
                self.read = wanted / len(ids)
                if self.progress is not None:
                    self.progress.note(
                        f"{self.source.source}: {len(ids)} tokens of text for {wanted} tokens of training; "
                        f"it is read {self.read:.1f} times"
                    )
        rows_NT = torch.tensor(ids[:wanted], dtype=torch.int64).view(self.sequences, body)
        numbers = torch.searchsorted(torch.tensor(begins), torch.arange(wanted), right=True)
        documents_NT = numbers.view(self.sequences, body)
        if not start:
            return rows_NT, documents_NT
        rows_NT = torch.cat([torch.full((self.sequences, 1), bos, dtype=torch.int64), rows_NT], dim=1)
        return rows_NT, torch.cat([documents_NT[:, :1], documents_NT], dim=1)


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


def is_bare(
    source: TextSource,
    split: Split,
    teacher: Teacher | None,
    only: frozenset[str] | None,
    progress: Progress | None = None,
) -> bool:
    """Whether a source has nothing to hold out; announced."""
    if (
        split != "held_out"
        or source.source == SYNTHETIC
        or next(read_texts(source, split=split, teacher=teacher, only=only, progress=progress), None)
    ):
        return False
    if progress is not None and only is None:
        progress.note(f"{source.source}: a single document, used for training only; nothing of it is held out")
    return True


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
