"""Rows of whole dialogues: each in one row, the rows filled as far as whole dialogues fill them.

The template writes how a dialogue begins and ends, so nothing stands between two of them. What is left of a row is
padding at its end, which nothing sees and no loss counts. Best fit: a dialogue goes into the fullest row that has room
for it, which for documents much shorter than a row leaves little (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv:2404.10830).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.data.chat_tokens import ChatTokens, chat_tokens, dialogues
from retrofit.data.corpora import Text
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.values import LossOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISSES = 64  # dialogues in turn that find no room before the rows are full


@dataclass(frozen=True)
class ChatRows:
    """ids, documents: int64 [N, T], as `packing.Packed` has them, the padding of a row a document of its own.

    counted: bool [N, T], whether the loss counts what follows a token.
    """

    ids_NT: Tensor
    documents_NT: Tensor
    counted_NT: Tensor
    notes: tuple[str, ...]


def chat_rows(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    seed: int,
    *,
    loss_on: LossOn,
    kind: str,
) -> ChatRows:
    """`rows` rows of whole dialogues; they are read again, in another order, where they do not fill the rows.

    One longer than a row is cut after the last turn of the assistant that fits, or left out where none does; a note
    counts both. Raises what `chat_tokens` raises, and UserError where no dialogue fits.
    """
    whole = chat_tokens(texts, tokenizer, loss_on)
    fitting = [one for one in (dialogue.cut(length) for dialogue in whole) if one is not None]
    if not fitting:
        raise UserError(
            f"no dialogue has a turn of the assistant that ends within {length} tokens; the shortest has "
            f"{min(len(one.ids) for one in whole)}",
            where=f"text source `{shown(kind, 60)}`",
            fix="use a longer sequence_length, or shorter dialogues",
        )
    bins, read = _packed(fitting, rows, length, seed)
    pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else fitting[0].ids[0]
    ids_NT = torch.full((rows, length), pad, dtype=torch.int64)
    documents_NT = torch.full((rows, length), -1, dtype=torch.int64)
    counted_NT = torch.zeros((rows, length), dtype=torch.bool)
    number = 0
    for row, some in enumerate(bins):
        at = 0
        for one in some:
            stop = at + len(one.ids)
            ids_NT[row, at:stop] = torch.tensor(one.ids)
            documents_NT[row, at:stop] = number
            counted_NT[row, at : stop - 1] = torch.tensor(one.scored[1:], dtype=torch.bool)
            at, number = stop, number + 1
    return ChatRows(ids_NT, documents_NT, counted_NT, _notes(kind, whole, fitting, bins, read, counted_NT, length))


def _packed(given: Sequence[ChatTokens], rows: int, length: int, seed: int) -> tuple[list[list[ChatTokens]], float]:
    """(what each row holds, how often the dialogues were read)."""
    generator = torch.Generator().manual_seed(seed)
    bins: list[list[ChatTokens]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), in order
    placed = misses = 0
    shortest = min(len(one.ids) for one in given)
    while True:
        for index in torch.randperm(len(given), generator=generator).tolist():
            one = given[index]
            at = bisect.bisect_left(room, (len(one.ids), -1))
            if at < len(room):
                left, row = room.pop(at)
            elif len(bins) < rows:
                left, row = length, len(bins)
                bins.append([])
            else:
                misses += 1
                if misses >= _MISSES or room[-1][0] < shortest:
                    return bins, placed / len(given)
                continue
            misses, placed = 0, placed + 1
            bins[row].append(one)
            bisect.insort(room, (left - len(one.ids), row))
        if len(bins) == rows and room[-1][0] < shortest:
            return bins, placed / len(given)


def _notes(
    kind: str,
    whole: Sequence[ChatTokens],
    fitting: Sequence[ChatTokens],
    bins: Sequence[Sequence[ChatTokens]],
    read: float,
    counted_NT: Tensor,
    length: int,
) -> tuple[str, ...]:
    name = f"`{shown(kind, 60)}`"
    filled = sum(len(one.ids) for some in bins for one in some)
    notes = [
        f"{name}: {dialogues(len(fitting))} of {sum(len(one.ids) for one in fitting):,} tokens, read {read:.1f} times "
        f"into {len(bins):,} rows of {length:,}; the loss counts {int(counted_NT.sum()):,} tokens, and "
        f"{1 - filled / counted_NT.numel():.0%} of the rows is padding"
    ]
    cut = sum(len(one.ids) > length and one.cut(length) is not None for one in whole)
    if cut:
        notes.append(f"{name}: longer than {length:,} tokens, cut after a turn of the assistant: {dialogues(cut)}")
    if left_out := len(whole) - len(fitting):
        notes.append(
            f"{name}: left out, as no turn of the assistant ends within {length:,} tokens: {dialogues(left_out)}"
        )
    return tuple(notes)
