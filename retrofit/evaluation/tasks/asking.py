"""Questions about a text that was read: the greedy answer, and what right and wrong answers lose."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import reading
from retrofit.evaluation.tasks.haystack import encode
from retrofit.kernels.registry import KernelChoice
from retrofit.model.frequencies import frequencies_of
from retrofit.system.dealing import collected, own_share
from retrofit.system.resume import DISCARDED, Kept
from retrofit.system.world import ALONE, World

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
    text_read = reader.mark()
    reader.read(_tensor(reader, encode(tokenizer, question.text)))
    asked = reader.mark()
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

    The cache goes back to the end of the last chunk that a text shares with the one before. It is marked there while
    that one is read, so a text has to be announced to those before it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, chunk: int) -> None:
        self._model, self._tokenizer, self._length = model, tokenizer, length
        self._reader = Reader(model, length + EXTRA_TOKENS, chunk=chunk)
        self._held: list[int] = []
        self._marks: list[int] = []

    def answers(self, text: Text, following: Sequence[Text] = ()) -> list[Answer]:
        """Read a text and ask its questions. following: texts that this reader will read next, in their order."""
        shared = _shared(text.ids, self._held, self._reader.chunk)
        start = max((mark for mark in self._marks if mark <= shared), default=0)
        ahead = [mark for mark in _returns(text, following, self._reader.chunk) if mark > start]
        with frequencies_of(self._model, self._length):
            self._reader.rewind(start)
            for begin, stop in itertools.pairwise((start, *ahead, len(text.ids))):
                self._reader.read(torch.tensor(text.ids[begin:stop], device=self._model.device))
                if stop in ahead:
                    self._reader.mark()
            self._held = text.ids
            self._marks = [mark for mark in self._marks if mark <= start] + ahead
            return [ask(self._reader, self._tokenizer, question) for question in text.questions]


def _returns(text: Text, following: Sequence[Text], chunk: int) -> list[int]:
    """Where the reader of `text` comes back to for those that follow, ascending; nothing is shared after a 0."""
    found, least, before = set(), len(text.ids), text
    for after in following:
        least = min(least, _shared(after.ids, before.ids, chunk))
        if not least:
            break
        found.add(least)
        before = after
    return sorted(found)


def tokens_read(texts: Sequence[Text], chunk: int) -> int:
    """Tokens that one `TextReader` reads for all of the texts, in this order, each announced to those before it."""
    before: list[list[int]] = [[], *(text.ids for text in texts)]
    return sum(len(text.ids) - _shared(text.ids, held, chunk) for text, held in zip(texts, before, strict=False))


def answers_about(
    texts: Mapping[str, T],
    read: Callable[[T, Sequence[T]], Sequence[Answer]],
    model: PreTrainedModel,
    *,
    test: str,
    chunk: int,
    kernel: KernelChoice | None,
    meta: Mapping[str, object] | None,
    partial: Path | None,
    together: Callable[[T], Hashable] | None = None,
    world: World = ALONE,
    progress: Progress | None,
) -> tuple[dict[str, tuple[Answer, ...]], str]:
    """(answers to the questions about each text, by its name; the kernel that read them).

    read: gives the answers about one text; its second argument are the texts that it will be given next. partial: a
    folder where answers are kept until all are there, for the next call with the same question; meta: what else they
    depend on, above all the digests of the model and its tokenizer. world: the processes that make this call, each with
    the model; they share the texts, and all return all answers.
    together: texts of one value of it are read by one process, as far as there are enough values for all of them.
    progress: of the texts of this process.
    """
    with reading(model, kernel, progress) as used:
        how = {"dtype": str(model.dtype), "device": model.device.type, "kernel": used, "chunk": chunk}
        kept = Kept(partial, {**(meta or {}), **how, "haystacks_sha256": _digest(texts.values())}, world)
        if kept.discarded and progress:
            progress.note(f"{DISCARDED}; asked anew")
        found = {name: tuple(map(_restored, some)) for name, some in kept.values(texts).items()}
        own = _own({name: text for name, text in texts.items() if name not in found}, together, world)
        if progress:
            progress.start(test, sum(len(texts[name].ids) for name in (*found, *own)), "tokens")
            for name in found:
                progress.advance(len(texts[name].ids), text=name)
        answered: dict[str, tuple[Answer, ...]] = {}
        for index, name in enumerate(own):
            answered[name] = tuple(read(texts[name], [texts[later] for later in own[index + 1 :]]))
            kept.put_values(name, [asdict(answer) for answer in answered[name]])
            if progress:
                progress.advance(len(texts[name].ids), text=name)
        found |= collected(answered, world)
    if progress:
        progress.finish()
    return {name: found[name] for name in texts}, used


def _own(texts: Mapping[str, T], together: Callable[[T], Hashable] | None, world: World) -> list[str]:
    """Names of the texts that this process reads."""
    groups: dict[Hashable, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(together(text) if together else name, []).append(name)
    if len(groups) < world.size:
        groups = {name: [name] for name in texts}
    costs = {key: sum(len(texts[name].ids) for name in names) for key, names in groups.items()}
    return [name for key in own_share(costs, world) for name in groups[key]]


def _restored(stored: Mapping[str, Any]) -> Answer:
    """An answer from its JSON values."""
    return Answer(**{**stored, "expected": tuple(stored["expected"])})


def _digest(texts: Iterable[Text]) -> str:
    asked = hashlib.sha256()
    for text in texts:
        asked.update(repr((list(text.ids), list(text.questions))).encode())
    return asked.hexdigest()


def _shared(ids: Sequence[int], before: Sequence[int], chunk: int) -> int:
    """How many tokens of `ids` need no reading where `before` was read: whole chunks, and not all of them."""
    shared = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before)))
    shared = min(shared, len(ids) - 1)
    return shared - shared % chunk


def _tensor(reader: Reader, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=reader.model.device)
