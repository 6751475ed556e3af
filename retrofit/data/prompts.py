"""Prompts that samples of a model begin with: first lines of given texts, and first questions of given dialogues.

Text that samples are trained on gives its training side, text that they are measured with its held-out side.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from retrofit.data.corpora import BUILT_IN, Split, built_in_texts
from retrofit.data.sources import HUB, rows, side
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.dialogues import write_questions
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import PromptSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PROMPTS = 2048  # of one source
LINE_CHARS = 160  # of a first line; the rest is the model's to write
QUESTION_CHARS = 800  # of a dialogue up to the start of an answer, which needs room; longer ones are left out
_FEWEST_WORDS = 3

Prompts = Mapping[PromptSource, Sequence[str]]


def read_prompts(sources: Sequence[PromptSource], split: Split, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The prompts of each source, each once: first lines of its texts, or of its dialogues the turns up to the user's
    first and the start of an answer, as the model's chat template writes them.

    Raises UserError for a source without any to train on, and as reading it and writing dialogues do. Nothing of one
    single document is held out: such sources are not among those of that side.
    """
    found: dict[PromptSource, Sequence[str]] = {}
    for source in sources:
        prompts = list(dict.fromkeys(_prompts(source, split, tokenizer)))
        if prompts:
            found[source] = prompts
        elif split == "train":
            raise UserError(
                "nothing of it can be a prompt",
                where=f"text source `self`, prompts `{shown(source.source)}`",
                fix=f"name text whose lines have at least {_FEWEST_WORDS} words, or dialogues with questions of at "
                f"most {QUESTION_CHARS} characters",
            )
    return found


def choose_prompts(prompts: Prompts, *, count: int, seed: str) -> tuple[str, ...]:
    """`count` prompts, each source's share by its weight, read again in another order where there are too few.

    A larger count begins with the prompts of a smaller one.
    """
    if not prompts:
        return ()
    sources = list(prompts)
    orders = {source: random.Random(f"{seed} {index}") for index, source in enumerate(sources)}
    left: dict[PromptSource, list[str]] = {source: [] for source in sources}
    chosen: list[str] = []
    for source in random.Random(seed).choices(sources, [source.weight for source in sources], k=count):
        if not left[source]:
            left[source] = orders[source].sample(prompts[source], len(prompts[source]))
        chosen.append(left[source].pop())
    return tuple(chosen)


def first_lines(text: str) -> Iterator[str]:
    """The first line of a text and of its paragraphs, cut after a word; short ones and underlines are left out."""
    begins = True
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        if begins and len(words) >= _FEWEST_WORDS:
            cut = line[:LINE_CHARS]
            yield line if len(line) <= LINE_CHARS else cut.rpartition(" ")[0] or cut
        begins = not words


def _prompts(source: PromptSource, split: Split, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if source.source in BUILT_IN:
        texts = ((text.text, text.dialogue) for text in built_in_texts(source.source, split))
    else:
        read = rows(TextSource.model_validate(source.model_dump()))
        texts = ((row.text, row.dialogue) for row in side(read, split, source.source.startswith(HUB)))
    first = next(texts, None)
    if first is None:
        return
    if first[1] is None:
        lines = (line for text, _ in chain([first], texts) for line in first_lines(text))
        yield from islice(lines, MOST_PROMPTS)
        return
    some = [dialogue for _, dialogue in chain([first], islice(texts, MOST_PROMPTS - 1)) if dialogue is not None]
    for question in write_questions(tokenizer, [(one.turns, one.tools, one.where) for one in some]):
        if len(question) <= QUESTION_CHARS:
            yield question
