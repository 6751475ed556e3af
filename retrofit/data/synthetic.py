"""Synthetic long texts in the model's own tokens, which nothing but the far context can answer.

Four tasks in turn, each filling a row exactly:

- `facts`: records hidden in prose, then a question about each of them;
- `repeat`: a passage, and much later the same passage again;
- `rename`: a passage of code, and much later the same with names exchanged, which are listed before it;
- `continue`: at the end, how sentences went on that stand far before.

Prose and code are the built-in texts' side of the split. Keys and values are made up, of other forms than those of the
needle and RULER tests (a word of syllables, three digits and three letters), and so are the words around them: who is
trained on this has not seen what is measured. The answers' tokens, a copy's from its second word on, are marked.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

import keyword
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from retrofit.data.corpora import Split, built_in_texts
from retrofit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # raise it when the same seed would give other text
PASSAGE = 8  # a passage is this part of a row, at most
FACTS = 128  # tokens of a row for each fact that it hides
LEAST_COPY = 24  # tokens of a passage that is worth a copy

_FACTS = (
    (" Locker {key} opens with {value}.", "\nWhich code opens locker {key}? It is", " {value}."),
    (" The file of {key} is kept under {value}.", "\nUnder which mark is the file of {key} kept? Under", " {value}."),
    (" {key} lives behind door {value}.", "\nBehind which door does {key} live? Behind door", " {value}."),
    (" In the register {key} stands as {value}.", "\nHow does {key} stand in the register? As", " {value}."),
)
_AGAIN = ("\n\nOnce more from above:\n", "\n\nThe same passage again:\n", "\n\nAs it was written before:\n")
_RENAMED = "\n\n# The same again, with other names: {names}.\n"
_CONTINUE = (
    ('\nHow did the sentence go on that began "{begin}"? "', '{rest}"'),
    ('\nWhat came after the words "{begin}"? "', '{rest}"'),
)
_QUESTIONS = ("\n\nQuestions about the text.", "\n\nNow from memory.", "\n\nWhat was written above:")

Part = tuple[list[int], bool]  # tokens, and whether they are an answer


@dataclass(frozen=True)
class SyntheticRows:
    """ids_NT: int64 [N, T], each row one text. counted_NT: bool, whether what follows a token is an answer's."""

    ids_NT: Tensor
    counted_NT: Tensor


def synthetic_rows(
    tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int, *, split: Split = "train"
) -> SyntheticRows:
    """`rows` rows of `length` tokens, BOS first; the same arguments give the same rows.

    Raises UserError for rows that are too short for any task.
    """
    import torch

    filler = _Filler(tokenizer, split)
    ids_NT = torch.empty(rows, length, dtype=torch.int64)
    counted_NT = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        rng = random.Random(f"synthetic {VERSION} {seed} {split} {row}")
        task = TASKS[row % len(TASKS)]
        begin: list[Part] = [([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], False)]
        parts = begin + task(filler, length - len(begin[0][0]), rng)
        ids = [token for part, _ in parts for token in part]
        answers = [answer for part, answer in parts for _ in part]
        assert len(ids) == length
        ids_NT[row] = torch.tensor(ids)
        counted_NT[row, :-1] = torch.tensor(answers[1:])
    return SyntheticRows(ids_NT, counted_NT)


def require_room(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
    """UserError where rows of `length` tokens are too short for one of the tasks, found on a few rows of each."""
    synthetic_rows(tokenizer, 4 * len(TASKS), length, seed)


class _Filler:
    """Prose and code of one side of the built-in texts, as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> None:
        self.tokenizer, self.split = tokenizer, split

    @cached_property
    def prose(self) -> list[str]:
        """Paragraphs."""
        texts = [text.text for text in built_in_texts("python-docs", self.split)]
        return [re.sub(r"\s+", " ", one).strip() for text in texts for one in text.split("\n\n") if len(one) > 80]

    @cached_property
    def code(self) -> list[str]:
        """Source files."""
        return [text.text for text in built_in_texts("python-stdlib", self.split)]

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def paragraphs(self, tokens: int, rng: random.Random) -> list[list[int]]:
        """Paragraphs in random order that have so many tokens together, the last one cut."""
        found: list[list[int]] = []
        while tokens > 0:
            for paragraph in rng.sample(self.prose, len(self.prose)):
                ids = self.encode(" " + paragraph)[:tokens]
                found.append(ids)
                tokens -= len(ids)
                if tokens <= 0:
                    break
        return found


def _facts(filler: _Filler, room: int, rng: random.Random) -> list[Part]:
    wanted = max(2, room // FACTS)
    heading = filler.encode(rng.choice(_QUESTIONS))
    keys = _distinct(_name, wanted, rng)
    values = _distinct(_value, wanted, rng)
    facts: list[list[int]] = []
    asked: list[list[Part]] = []
    used = len(heading)
    for key, value in zip(keys, values, strict=True):
        fact, question, answer = (one.format(key=key, value=value) for one in rng.choice(_FACTS))
        one = [(filler.encode(question), False), (filler.encode(answer), True)]
        size = len(filler.encode(fact)) + sum(len(ids) for ids, _ in one)
        if used + size > room // 2 and facts:
            break
        facts.append(filler.encode(fact))
        asked.append(one)
        used += size
    _require_room(room - used, room)
    hidden = _hidden(filler.paragraphs(room - used, rng), facts, rng)
    rng.shuffle(asked)
    return [*hidden, (heading, False), *(part for one in asked for part in one)]


def _repeat(filler: _Filler, room: int, rng: random.Random) -> list[Part]:
    again = filler.encode(rng.choice(_AGAIN))
    size = room // PASSAGE
    _require_room(size - LEAST_COPY, room)
    passage = [token for one in filler.paragraphs(size, rng) for token in one]
    return _copied(filler, room, rng, passage, again, passage)


def _rename(filler: _Filler, room: int, rng: random.Random) -> list[Part]:
    size = room // PASSAGE
    _require_room(size - LEAST_COPY, room)
    text = rng.choice(filler.code)
    begin = text.rfind("\n", 0, rng.randrange(max(1, len(text) - 8 * size))) + 1
    passage = str(filler.tokenizer.decode(filler.encode("\n" + text[begin : begin + 8 * size])[: size - size // 8]))
    names = sorted({name for name in re.findall(r"\b[a-z_]{4,20}\b", passage) if not keyword.iskeyword(name)})
    chosen = rng.sample(names, min(3, len(names)))
    given = dict(zip(chosen, _distinct(_name, len(chosen), rng), strict=True))
    listed = ", ".join(f"{new.lower()} for {old}" for old, new in given.items())
    renamed = re.sub(r"\b[a-z_]{4,20}\b", lambda match: given.get(match[0], match[0]).lower(), passage)
    copy = filler.encode(renamed)
    return _copied(filler, room, rng, filler.encode(passage), filler.encode(_RENAMED.format(names=listed)), copy)


def _continue(filler: _Filler, room: int, rng: random.Random) -> list[Part]:
    heading = filler.encode(rng.choice(_QUESTIONS))
    hidden: list[list[int]] = []
    asked: list[list[Part]] = []
    used = len(heading)
    for paragraph in rng.sample(filler.prose, len(filler.prose)):
        words = paragraph.split(" ")
        if len(words) < 24 or '"' in paragraph:
            continue
        begin, rest = " ".join(words[:8]), " " + " ".join(words[8:24])
        question, answer = (one.format(begin=begin, rest=rest) for one in rng.choice(_CONTINUE))
        one = [(filler.encode(question), False), (filler.encode(answer), True)]
        text = filler.encode(" " + " ".join(words[:32]))
        size = len(text) + sum(len(ids) for ids, _ in one)
        if used + size > room // 2 or len(hidden) > room // FACTS:
            break
        hidden.append(text)
        asked.append(one)
        used += size
    _require_room(len(hidden), room)
    rng.shuffle(asked)
    parts = _hidden(filler.paragraphs(room - used, rng), hidden, rng)
    return [*parts, (heading, False), *(part for one in asked for part in one)]


def _copied(
    filler: _Filler, room: int, rng: random.Random, first: list[int], between: list[int], copy: list[int]
) -> list[Part]:
    """Filler, a passage in the first third, filler, and its copy at the end, marked from its second word on."""
    begin = len(filler.encode(" word"))
    left = room - len(first) - len(between) - len(copy)
    _require_room(left, room)
    ids = [token for one in filler.paragraphs(left, rng) for token in one]
    at = rng.randrange(1 + left // 3)
    marked = [(copy[:begin], False), (copy[begin:], True)]
    return [(ids[:at], False), (first, False), (ids[at:], False), (between, False), *marked]


def _hidden(paragraphs: list[list[int]], pieces: Sequence[list[int]], rng: random.Random) -> list[Part]:
    """The pieces at random ends of paragraphs."""
    places = sorted(rng.randrange(len(paragraphs) + 1) for _ in pieces)
    parts: list[Part] = []
    done = 0
    for place, piece in zip(places, rng.sample(list(pieces), len(pieces)), strict=True):
        parts += [(ids, False) for ids in paragraphs[done:place]] + [(piece, False)]
        done = place
    return parts + [(ids, False) for ids in paragraphs[done:]]


def _distinct(make: Callable[[random.Random], str], count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def _name(rng: random.Random) -> str:
    """A word that nobody has used: three syllables."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)).capitalize()


def _value(rng: random.Random) -> str:
    """Three digits and three letters."""
    return f"{rng.randrange(100, 1000)}-{''.join(rng.choice('bcdfghjkmnpqrtvwxz') for _ in range(3))}"


def _require_room(left: int, room: int) -> None:
    if left < 1:
        raise UserError(
            f"rows of {room + 1} tokens have no room for synthetic text",
            where="text source `synthetic`",
            fix=f"use longer ones, for example sequence_length: {max(512, 2 * (room + 1))}, or leave `synthetic` out",
        )


TASKS: tuple[Callable[[_Filler, int, random.Random], list[Part]], ...] = (_facts, _repeat, _rename, _continue)
