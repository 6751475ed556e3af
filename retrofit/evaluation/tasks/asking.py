"""Questions about a text that was read: the greedy answer, and what right and wrong answers lose."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retrofit.evaluation.tasks.haystack import encode
from retrofit.system.resume import DISCARDED, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.evaluation.scoring.reader import Reader

EXTRA_TOKENS = 4  # generated beyond the answer, so that a longer number does not pass for the right one


@dataclass(frozen=True)
class Question:
    """One question about a text.

    text: what is asked, up to where the answer begins. expected: strings a whole answer holds. right, wrong:
    continuations to compare by loss; each is one way to answer (or to begin to). tokens: to generate.
    """

    text: str
    expected: tuple[str, ...]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    tokens: int

    def room(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the question and of the longest of: its answers, what is generated."""
        longest = max(len(encode(tokenizer, text)) for text in (*self.right, *self.wrong))
        return len(encode(tokenizer, self.text)) + max(longest, self.tokens)


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    recall: share of the expected strings in the answer. starts: the answer begins with the first of them and does not
    go on with another digit or letter (exact match). loss: nats per token of the right continuations; margin: how much
    more the likeliest wrong one loses, below 0 where it is preferred. token_match: share of the right tokens that are
    the likeliest after the right ones before them: a number that stands in the text once half of it is given away.
    """

    expected: tuple[str, ...]
    answered: str
    recall: float
    starts: bool
    loss: float
    margin: float
    token_match: float


def ask(reader: Reader, tokenizer: PreTrainedTokenizerBase, question: Question) -> Answer:
    """Ask about what was read. The question stays unread afterwards, so that the next one finds the same text."""
    text_read = reader.position
    reader.read(_tensor(reader, encode(tokenizer, question.text)))
    asked = reader.position
    answered = str(tokenizer.decode(reader.greedy(question.tokens)))
    reader.rewind(asked)
    losses, matches = [], []
    for text in question.right:
        found, right = reader.judged(_tensor(reader, encode(tokenizer, text)))
        reader.rewind(asked)
        losses.append(float(found.mean()))
        matches.append(float(right.double().mean()))
    wrong = []
    for text in question.wrong:
        wrong.append(float(reader.losses(_tensor(reader, encode(tokenizer, text))).mean()))
        reader.rewind(asked)
    reader.rewind(text_read)
    loss = sum(losses) / len(losses)
    first = question.expected[0]
    head = answered.strip()
    return Answer(
        expected=question.expected,
        answered=head,
        recall=sum(text.lower() in answered.lower() for text in question.expected) / len(question.expected),
        starts=head.startswith(first) and not head[len(first) : len(first) + 1].isalnum(),
        loss=loss,
        margin=min(wrong) - loss,
        token_match=sum(matches) / len(matches),
    )


def kept_answers(
    partial: Path | None,
    model: PreTrainedModel,
    haystacks: Iterable[tuple[Sequence[int], Sequence[Question]]],
    *,
    kernel: str,
    chunk: int,
    meta: Mapping[str, object] | None,
    progress: Progress | None,
) -> Kept:
    """What an earlier call with these haystacks and questions has finished; nothing where `partial` is None.

    meta: what else the answers depend on, above all the digests of the model and its tokenizer.
    """
    asked = hashlib.sha256()
    for ids, questions in haystacks:
        asked.update(repr((list(ids), list(questions))).encode())
    how = {"dtype": str(model.dtype), "device": str(model.device), "kernel": kernel, "chunk": chunk}
    kept = Kept(partial, {**(meta or {}), **how, "haystacks_sha256": asked.hexdigest()})
    if kept.discarded and progress:
        progress.note(f"{DISCARDED}; asked anew")
    return kept


def answered(kept: Kept, name: str, answers: Callable[[], Sequence[Answer]]) -> tuple[Answer, ...]:
    """The answers about one haystack: those that were kept under `name`, or else what `answers` finds, then kept."""
    found = kept.get_values(name)
    if found is None:
        now = tuple(answers())
        kept.put_values(name, [asdict(answer) for answer in now])
        return now
    return tuple(Answer(**{**one, "expected": tuple(one["expected"])}) for one in found)


def _tensor(reader: Reader, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=reader.model.device)
