"""What a choice of layers is measured on: text, and three kinds of answers that lie outside of every window.

- `answers`: passages that come again (`rows`);
- `needles`: made-up numbers that are asked for when the facts which gave them are out of sight, in the words of the
  needle test, hidden in the text that is measured;
- `keys`: tokens of the text that the far context makes predictable, as LongPPL finds them (Fang et al. 2025,
  arXiv 2410.23771): their loss falls by more than 2 nats, to less than 2, against that of the same model when it is
  given the last window or half of it alone.

All rows are equally long and pass through the layers together.

Legend: N rows, R tokens of a row, P positions whose next token counts, S tokens of a short context.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrofit.data.calibration import CalibrationText
from retrofit.evaluation.metrics.longppl import key_tokens
from retrofit.evaluation.tasks.haystack import encode
from retrofit.evaluation.tasks.needle import DIGITS, KEYS, NEEDLE
from retrofit.windows import NEEDLE_ROWS
from retrofit.windows.rows import Repeats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDLES = 4
"""In a row, at most."""


@dataclass(frozen=True)
class Probes:
    """Rows that are measured together. ids [N, R]; positions [P] of every row; counted: bool [N, P], by what the losses
    there say; window: what the rows are made for."""

    input_ids_NR: Tensor
    positions: Tensor
    counted: Mapping[str, Tensor]
    window: int

    def means(self, losses_NP: Tensor) -> dict[str, float | None]:
        """Mean loss of every part, None where it has no token. losses: at `positions`."""
        found = {name: losses_NP.double()[own_NP] for name, own_NP in self.counted.items()}
        return {name: float(own.mean()) if len(own) else None for name, own in found.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of every part."""
        return {name: int(own_NP.sum()) for name, own_NP in self.counted.items()}

    def with_keys(self, keys_NP: Tensor) -> Probes:
        """The same with tokens that need the far context."""
        return replace(self, counted={**self.counted, "keys": keys_NP})


@dataclass(frozen=True)
class Needles:
    """ids [N, R]; counted: bool [N, R], whether what follows a token is of a number that is asked for."""

    input_ids_NR: Tensor
    counted_NR: Tensor


def probes(repeats: Repeats, needles: Needles | None) -> Probes:
    """Passages that come again, and below them needles, where there are any."""
    parts = repeats.parts
    hidden_NR = torch.zeros(0, repeats.length, dtype=torch.bool) if needles is None else needles.counted_NR
    at = sorted({*repeats.positions.tolist(), *hidden_NR.nonzero()[:, 1].tolist()})
    positions, rows = torch.tensor(at), len(repeats.input_ids_NR)
    none_NP = torch.zeros(rows + len(hidden_NR), len(at), dtype=torch.bool)
    counted = {name: none_NP.clone() for name in (*parts, "needles")}
    for name, part in parts.items():
        counted[name][:rows] = torch.isin(positions, part)
    counted["needles"][rows:] = hidden_NR[:, positions]
    ids = [repeats.input_ids_NR, *([] if needles is None else [needles.input_ids_NR])]
    return Probes(torch.cat(ids), positions, counted, repeats.window)


def needles(tokenizer: PreTrainedTokenizerBase, text: CalibrationText, rows: Repeats) -> Needles | None:
    """Rows of the ends of a text's first sequences, with facts, and questions whose windows see none of them; None
    where a window has no room for one. rows: of the same text; theirs are the beginnings."""
    made = []
    for index, ids_T in enumerate(text.input_ids_NT[:NEEDLE_ROWS]):
        rng = random.Random(f"needles {index}")
        one = _needle_row(tokenizer, ids_T[: rows.start].tolist(), ids_T[rows.start :].tolist(), rows, rng)
        if one is None:
            return None
        made.append(one)
    ids, counted = zip(*made, strict=True)
    return Needles(torch.tensor(ids), torch.tensor(counted))


def _needle_row(
    tokenizer: PreTrainedTokenizerBase, bos: list[int], body: list[int], rows: Repeats, rng: random.Random
) -> tuple[list[int], list[bool]] | None:
    """Ids, and what of them comes before a token of an answer."""
    facts: list[list[int]] = []
    asked: list[tuple[list[int], list[int]]] = []
    room = rows.length - rows.window - len(bos)  # beyond the window of the first question, without the questions
    for key in rng.sample(KEYS, NEEDLES):
        value = str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        words = (part.format(key=key, value=value) for part in (NEEDLE.fact, NEEDLE.question, NEEDLE.answer))
        fact, question, answer = (encode(tokenizer, one) for one in words)
        if len(fact) + len(question) + len(answer) > room:
            break
        room -= len(fact) + len(question) + len(answer)
        facts.append(fact)
        asked.append((question, answer))
    if not facts:
        return None
    rng.shuffle(asked)
    prose = rows.length - len(bos) - sum(map(len, facts)) - sum(len(q) + len(a) for q, a in asked)
    body, ids, done = body[-prose:], list(bos), 0
    for cut, fact in zip(sorted(rng.choices(range(room + 1), k=len(facts))), facts, strict=True):
        ids += [*body[done:cut], *fact]
        done = cut
    ids += body[done:]
    is_answer = [False] * len(ids)
    for question, answer in asked:
        ids += [*question, *answer]
        is_answer += [False] * len(question) + [True] * len(answer)
    return ids, [*is_answer[1:], False]


def short_contexts(rows: Repeats) -> Probes:
    """Every far token of the rows with half a window to a whole one before it, [2 N, S] ids."""
    window, ids_NR = rows.window, rows.input_ids_NR
    ids_NS = torch.cat([ids_NR[:, start : start + window + 1] for start in _starts(rows)])
    if rows.start:
        ids_NS[:, 0] = ids_NR[0, 0]
    return Probes(ids_NS, torch.arange(window // 2, window), {}, window)


def keys(rows: Repeats, probes: Probes, losses_NP: Tensor, short_NS: Tensor) -> Tensor:
    """Which positions of `probes` the far context is needed for, bool [N, P].

    losses: of the model as it is, at `probes.positions`; short: the same after `short_contexts` of the rows, with which
    the probes begin.
    """
    count, half = len(rows.input_ids_NR), rows.window // 2
    short_NR = torch.full((count, rows.length), -torch.inf)
    for start, own in zip(_starts(rows), short_NS.split(count), strict=True):
        short_NR[:, start + half : start + rows.window] = own
    found_NP = torch.zeros(losses_NP.shape, dtype=torch.bool)
    long, short = losses_NP[:count].numpy(), short_NR[:, probes.positions].numpy()
    found_NP[:count] = torch.from_numpy(np.stack(key_tokens(list(long), list(short))))
    return found_NP & probes.counted["far"]


def _starts(rows: Repeats) -> tuple[int, int]:
    return rows.window // 2, rows.length - rows.window - 1
