"""Prompts that samples of a model begin with: first lines of given texts.

Text that samples are trained on gives its training side, text that they are measured with its held-out side.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from retrofit.data.corpora import BUILT_IN, Split, built_in_texts
from retrofit.data.sources import HUB, rows, side
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import PromptSource

MOST_PROMPTS = 4096  # of one source
PROMPT_CHARS = 160  # of a line; the rest is the model's to write
_FEWEST_WORDS = 3


def prompts_of(sources: Sequence[PromptSource], split: Split, *, count: int, seed: int) -> tuple[str, ...]:
    """`count` prompts, each source's share by its weight; read again in another order where a source has too few.

    Raises UserError for a source without a line that could be one. Where nothing of a source is held out, the others
    stand in for it on that side; () where that is so of all.
    """
    lines = {source: list(dict.fromkeys(islice(_lines(source, split), MOST_PROMPTS))) for source in sources}
    for source, found in lines.items():
        if not found and split == "train":
            raise UserError(
                "no line of it can be a prompt",
                where=f"text source `self`, prompts `{shown(source.source)}`",
                fix=f"name text whose lines have at least {_FEWEST_WORDS} words",
            )
    usable = [source for source in sources if lines[source]]
    if not usable:
        return ()
    # A larger count begins with the prompts of a smaller one.
    orders = {source: random.Random(f"{seed} {split} {source.source}") for source in usable}
    left: dict[PromptSource, list[str]] = {source: [] for source in usable}
    chosen: list[str] = []
    for source in random.Random(f"{seed} {split}").choices(usable, [source.weight for source in usable], k=count):
        if not left[source]:
            left[source] = orders[source].sample(lines[source], len(lines[source]))
        chosen.append(left[source].pop())
    return tuple(chosen)


def _lines(source: PromptSource, split: Split) -> Iterator[str]:
    if source.source in BUILT_IN:
        texts: Iterator[str] = (text.text for text in built_in_texts(source.source, split))
    else:
        read = rows(TextSource.model_validate(source.model_dump()))
        texts = (row.text for row in side(read, split, source.source.startswith(HUB)))
    for text in texts:
        yield from first_lines(text)


def first_lines(text: str) -> Iterator[str]:
    """The first line of a text and of its paragraphs, cut after a word; short ones and underlines are left out."""
    begins = True
    for line in text.splitlines():
        words = line.split()
        if begins and len(words) >= _FEWEST_WORDS:
            cut = line.strip()[:PROMPT_CHARS]
            yield cut if len(line.strip()) <= PROMPT_CHARS else cut.rpartition(" ")[0] or cut
        begins = not words
