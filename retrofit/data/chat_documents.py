"""Dialogues that are measured: each a document of its own, of which the assistant's turns are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from retrofit.data.chat_tokens import ChatTokens, chat_tokens, dialogues
from retrofit.data.corpora import Text
from retrofit.data.documents import Document, token_sizes
from retrofit.data.sources import CHAT, kind_of
from retrofit.data.texts import measured_side, read_texts, readings_of
from retrofit.data.unseen import Candidate, Findings, choose
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.dialogues import AT_A_TIME
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import LossOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_documents(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    lengths: Sequence[int],
    loss_on: LossOn,
    trained_on: Sequence[TextSource],
    also_read: Sequence[TextSource] = (),
    read_chars: int | None = None,
    findings: Findings,
) -> list[Document]:
    """Dialogues of about `tokens` tokens a source, none of them trained on, all of the kind `chat`.

    Sides and copies as `evaluation_texts` has them. lengths: of the contexts that are asked for; a dialogue is read up
    to the longest, and left out where nothing is scored within the shortest.
    Raises UserError where nothing is left of a source, and what `chat_tokens` raises.
    """
    known: dict[tuple[int, str], ChatTokens] = {}
    silent = [0] * len(sources)

    def candidates(index: int) -> Iterator[Candidate]:
        side = measured_side(sources[index].source, [other.source for other in trained_on])
        texts = read_texts(sources[index], split=side)
        while some := list(islice(texts, AT_A_TIME)):
            for text, one in zip(some, chat_tokens(some, tokenizer, loss_on), strict=True):
                if any(one.scored[: min(lengths)]):
                    known[index, text.name] = one
                    yield Candidate(text, text.text)
                else:
                    silent[index] += 1

    streams, counts = [], []
    for index in range(len(sources)):
        stream, first, read = candidates(index), [], 0
        while read < tokens and (one := next(stream, None)) is not None:
            first.append(one)
            read += min(max(lengths), len(known[index, one.text.name].ids))
        streams.append(chain(first, stream))
        counts.append(len(first))
    chosen = choose(streams, counts, readings_of((*trained_on, *also_read), read_chars))
    documents = []
    for index, (source, found) in enumerate(zip(sources, chosen, strict=True)):
        kind = shown(kind_of(source.source))
        if not found.documents:
            raise UserError(
                f"no dialogue is left to measure{f': {found.why()}' if found.trained else ''}",
                where=f"text source `{shown(source.source)}`",
                fix="measure on dialogues that are not trained on, or give longer `evaluate.lengths`",
            )
        findings.add(CHAT, found, kind_of(source.source))
        if silent[index]:
            findings.notes.append(
                f"`{kind}`: left out, as nothing is scored within the first {min(lengths):,} tokens: "
                f"{dialogues(silent[index])}"
            )
        documents += [_document(text, known[index, text.name], tokenizer, max(lengths)) for text in found.documents]
    read = sum(len(one.input_ids) for one in documents)
    scored = sum(int(one.scored.sum()) for one in documents if one.scored is not None)
    findings.notes.append(
        f"`{CHAT}`: {dialogues(len(documents))} of {read:,} tokens, each read by itself; {scored:,} tokens are scored"
    )
    return documents


def _document(text: Text, one: ChatTokens, tokenizer: PreTrainedTokenizerBase, longest: int) -> Document:
    encoded = tokenizer(one.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    sizes = token_sizes(one.text, list(one.ids), encoded["offset_mapping"], tokenizer)
    whole = Document(
        text.name,
        CHAT,
        np.array(one.ids, np.int64),
        sum(sizes),
        np.array(sizes, np.int32),
        hashlib.sha256(one.text.encode()).hexdigest(),
        np.array(one.scored, bool),
    )
    return whole.cut(longest)
