"""Questions about a text that was read: the greedy answer, and what right and wrong answers lose."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from retrofit.evaluation.scoring.reader import Reader, frequencies_of
from retrofit.evaluation.scoring.score import reading
from retrofit.evaluation.tasks.haystack import encode
from retrofit.kernels.registry import KernelChoice
from retrofit.system.resume import DISCARDED, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress

T = TypeVar("T", bound="Text")
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


class Text(Protocol):
    """A text and the questions about it."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def questions(self) -> Sequence[Question]: ...


class TextReader:
    """Texts that end, answered, at one length, read one after another through one cache, and asked about.

    The cache goes back to the end of the last chunk that a text shares with the one before.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, chunk: int) -> None:
        self._model, self._tokenizer, self._length = model, tokenizer, length
        self._reader = Reader(model, length + EXTRA_TOKENS, chunk=chunk, rewindable=True)
        self._held: list[int] = []

    def answers(self, text: Text) -> list[Answer]:
        """Read a text and ask its questions."""
        shared = _shared(text.ids, self._held, self._reader.chunk)
        with frequencies_of(self._model, self._length):
            self._reader.rewind(shared)
            self._reader.read(torch.tensor(text.ids[shared:], device=self._model.device))
            self._held = text.ids
            return [ask(self._reader, self._tokenizer, question) for question in text.questions]


def tokens_read(texts: Sequence[Text], chunk: int) -> int:
    """Tokens that one `TextReader` reads for all of the texts, in this order."""
    before: list[list[int]] = [[], *(text.ids for text in texts)]
    return sum(len(text.ids) - _shared(text.ids, held, chunk) for text, held in zip(texts, before, strict=False))


def answers_about(
    texts: Mapping[str, T],
    read: Callable[[T], Sequence[Answer]],
    model: PreTrainedModel,
    *,
    test: str,
    chunk: int,
    kernel: KernelChoice | None,
    meta: Mapping[str, object] | None,
    partial: Path | None,
    progress: Progress | None,
) -> tuple[dict[str, tuple[Answer, ...]], str]:
    """(answers to the questions about each text, by its name; the kernel that read them).

    read: gives the answers about one text. partial: a folder where those are kept until all are there, for the next
    call with the same question; meta: what else they depend on, above all the digests of the model and its tokenizer.
    """
    found = {}
    if progress:
        progress.start(test, sum(len(text.ids) for text in texts.values()), "tokens")
    with reading(model, kernel, progress) as used:
        how = {"dtype": str(model.dtype), "device": str(model.device), "kernel": used, "chunk": chunk}
        kept = Kept(partial, {**(meta or {}), **how, "haystacks_sha256": _digest(texts.values())})
        if kept.discarded and progress:
            progress.note(f"{DISCARDED}; asked anew")
        for name, text in texts.items():
            found[name] = _answered(kept, name, lambda text=text: read(text))  # type: ignore[misc]
            if progress:
                progress.advance(len(text.ids), text=name)
    if progress:
        progress.finish()
    return found, used


def _digest(texts: Iterable[Text]) -> str:
    asked = hashlib.sha256()
    for text in texts:
        asked.update(repr((list(text.ids), list(text.questions))).encode())
    return asked.hexdigest()


def _answered(kept: Kept, name: str, answers: Callable[[], Sequence[Answer]]) -> tuple[Answer, ...]:
    """The answers about one text: those that were kept under `name`, or else what `answers` finds, then kept."""
    found = kept.get_values(name)
    if found is None:
        now = tuple(answers())
        kept.put_values(name, [asdict(answer) for answer in now])
        return now
    return tuple(Answer(**{**one, "expected": tuple(one["expected"])}) for one in found)


def _shared(ids: Sequence[int], before: Sequence[int], chunk: int) -> int:
    """How many tokens of `ids` need no reading where `before` was read: whole chunks, and not all of them."""
    shared = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before)))
    shared = min(shared, len(ids) - 1)
    return shared - shared % chunk


def _tensor(reader: Reader, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=reader.model.device)
