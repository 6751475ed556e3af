"""Rows of one document each: long contexts are learned from texts that are really long.

A row that several short texts share teaches no distance longer than they are. So a long row is a piece of one document
where one is long enough, in turn of as many documents as there are; only the rows that are left are packed, of the
longest documents first.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.data.corpora import Text
from retrofit.data.sources import MADE, SYNTHETIC
from retrofit.data.texts import read_texts
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.schema import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_ROW = 4096
"""Tokens from which on a row is one document where it can be."""


@dataclass(frozen=True)
class LongRows:
    """ids_NT: int64 [N, T], rows of one document each, at most as many as are wanted; documents_N: which one.

    rest: the texts for the rows that are missing, none of which is long enough, unless all of them are. longest: tokens
    of the longest document, 0 where none is worth counting.
    """

    ids_NT: Tensor
    documents_N: Tensor
    rest: tuple[Text, ...]
    longest: int

    def note(self, kind: str, wanted: int, length: int) -> str:
        """What a person should know of the rows of a kind of text."""
        whole, name = len(self.ids_NT), f"`{shown(kind, 60)}`"
        if whole == wanted:
            return f"{name}: each of {wanted:,} rows of {length:,} tokens is one document"
        longest = (
            f"the longest document has {self.longest:,} tokens" if self.longest else "no document is nearly so long"
        )
        return (
            f"{name}: {whole:,} of {wanted:,} rows of {length:,} tokens are one document, the others several; {longest}"
        )


def long_rows(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int) -> LongRows:
    """Up to `rows` rows of BOS (if the tokenizer has one) and a piece of one document, no piece twice.

    The documents take turns in random order, and so do the pieces of each.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(start)
    generator = torch.Generator().manual_seed(seed)
    pieces: list[tuple[int, int, list[int]]] = []  # (turn, document, ids)
    longest = 0
    order = torch.randperm(len(texts), generator=generator).tolist()
    for index in order:
        if len(texts[index].text.encode()) < body:  # a token covers a byte at least
            continue
        ids = tokenizer(texts[index].text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        count = len(ids) // body
        offset = int(torch.randint(0, len(ids) - count * body + 1, (), generator=generator)) if count else 0
        for turn, piece in enumerate(torch.randperm(count, generator=generator).tolist()):
            begin = offset + piece * body
            pieces.append((turn, index, [*start, *ids[begin : begin + body]]))
        if sum(turn == 0 for turn, *_ in pieces) >= rows:
            break
    chosen = sorted(pieces, key=lambda piece: piece[0])[:rows]  # stable: the order of the documents stays
    used = {index for _, index, _ in chosen}
    unused = [text for index, text in enumerate(texts) if index not in used] or list(texts)
    ids_NT = torch.tensor([ids for *_, ids in chosen], dtype=torch.int64).view(-1, length)
    documents_N = torch.tensor([index for _, index, _ in chosen], dtype=torch.int64)
    return LongRows(ids_NT, documents_N, _longest_first(unused, (rows - len(chosen)) * length), longest)


def require_long_documents(
    sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, length: int, *, limit_chars: int
) -> None:
    """UserError where no source has a document that fills a row of `length` tokens; synthetic text always does.

    limit_chars: how much of a source is looked at.
    """
    if any(source.source == SYNTHETIC for source in sources):
        return
    longest = 0
    for source in sources:
        texts = () if source.source in MADE else read_texts(source, split="train", limit_chars=limit_chars)
        for text in texts:
            if len(text.text.encode()) <= max(longest, length - 2):
                continue
            longest = max(longest, len(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]))
            if longest >= length - 1:
                return
    raise UserError(
        f"no document fills a row of {length:,} tokens"
        + (f"; the longest has {longest:,}" if longest else "")
        + ": short texts in one row teach no long distance",
        where="recover.text",
        fix="name longer texts (books, source files) or the source `synthetic`, or use shorter rows",
    )


def _longest_first(texts: Sequence[Text], tokens: int) -> tuple[Text, ...]:
    """The longest texts, until they hold so many tokens and more."""
    found: list[Text] = []
    size = 0
    for text in sorted(texts, key=lambda text: -len(text.text)):
        if size >= 8 * tokens:
            break
        found.append(text)
        size += len(text.text)
    return tuple(found)
