"""Multiple-choice questions: the log-likelihood of every option as what follows the question.

As in lm-evaluation-harness, an option stands behind its question and a space, and is scored by the sum of its tokens'
log-probabilities. The question is read once for all of its options.

Legend: B questions, R = B x N rows (an option each), P tokens of a question, T tokens of an option, M scored tokens,
C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from retrofit.evaluation.scoring.cache import growing_cache
from retrofit.evaluation.scoring.reader import head_of, require_positions
from retrofit.evaluation.scoring.score import reading
from retrofit.evaluation.tasks.haystack import encode
from retrofit.kernels.registry import KernelChoice
from retrofit.model.families import describe
from retrofit.model.frequencies import frequencies_of
from retrofit.system.dealing import collected, own_share
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress

ROWS = 256  # of logits [rows, V] that exist at one time


@dataclass(frozen=True)
class Choice:
    """One question. prompt: the text in front of each option, without the space between. right: index of the answer."""

    prompt: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Tokenized:
    """The tokens that all options of a question share, a BOS first where the tokenizer has one, and those of each."""

    shared: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...]

    @property
    def read(self) -> int:
        """Tokens that are read."""
        return len(self.shared) + sum(len(rest) - 1 for rest in self.rests)

    @property
    def longest(self) -> int:
        """Tokens of the question with its longest option."""
        return len(self.shared) + max(map(len, self.rests))


def tokenized(tokenizer: PreTrainedTokenizerBase, question: Choice) -> Tokenized:
    """Tokens of a question and its options, each tokenized together with the question, as it would be written.

    Where an option changes the last tokens of the question, they count as part of every option.
    """
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    prompt = encode(tokenizer, question.prompt)
    whole = [encode(tokenizer, f"{question.prompt} {option}") for option in question.options]
    same = 0
    while all(same < min(len(prompt), len(ids) - 1) and ids[same] == prompt[same] for ids in whole):
        same += 1
    same = same if bos else max(1, same)
    return Tokenized((*bos, *whole[0][:same]), tuple(tuple(ids[same:]) for ids in whole))


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Choice],
    *,
    name: str,
    tokens: int = 512,
    kernel: KernelChoice | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> list[tuple[float, ...]]:
    """Log-likelihood, in nats, of every option of every question.

    name: of the task, for the display. tokens: read in one forward pass at most, as far as questions can be parted.
    kernel: as `score` has it. world: the processes that make this call, each with the model; they share the batches,
    which are the same whatever their number, and all return all results.
    Raises UserError for a question beyond the model's learned positions.
    """
    asked = [tokenized(tokenizer, question) for question in questions]
    longest = max(one.longest for one in asked)
    require_positions(describe(model.config).learned_positions, longest, name)
    parts = dict(enumerate(batches(asked, tokens)))
    own = own_share({part: sum(asked[i].read for i in numbers) for part, numbers in parts.items()}, world)
    found: dict[int, tuple[float, ...]] = {}
    with reading(model, kernel, progress), frequencies_of(model, longest):
        if progress:
            progress.start(f"task {name}", sum(len(parts[part]) for part in own), "questions")
        for part in own:
            found |= zip(parts[part], _scored(model, [asked[i] for i in parts[part]]), strict=True)
            if progress:
                progress.advance(len(parts[part]))
        if progress:
            progress.finish()
    everything = collected(found, world)
    return [everything[i] for i in range(len(questions))]


def batches(asked: Sequence[Tokenized], tokens: int) -> Iterator[list[int]]:
    """Numbers of questions that are read together: equally many shared tokens and options, so that none is padded
    before its options."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, one in enumerate(asked):
        alike.setdefault((len(one.shared), len(one.rests)), []).append(index)
    for (shared, options), numbers in sorted(alike.items()):
        width = max(shared, options * max(len(rest) for i in numbers for rest in asked[i].rests))
        size = max(1, tokens // width)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _scored(model: PreTrainedModel, batch: Sequence[Tokenized]) -> list[tuple[float, ...]]:
    """Log-likelihoods of the options of a batch."""
    device, options = model.device, len(batch[0].rests)
    base, cache = model.get_decoder(), growing_cache(model.config)
    shared_BP = torch.tensor([one.shared for one in batch], device=device)
    hidden_BPC = base(input_ids=shared_BP, past_key_values=cache, use_cache=True).last_hidden_state
    hidden_RTC = hidden_BPC[:, -1:].repeat_interleave(options, 0)
    rests = [torch.tensor(rest) for one in batch for rest in one.rests]
    # What stands behind the end of an option is seen by no token before it.
    ids_RT = nn.utils.rnn.pad_sequence(rests, batch_first=True, padding_value=-1).to(device)
    if ids_RT.shape[1] > 1:
        cache.batch_repeat_interleave(options)
        read_RT = ids_RT[:, :-1].clamp(min=0)
        more_RTC = base(input_ids=read_RT, past_key_values=cache, use_cache=True).last_hidden_state
        hidden_RTC = torch.cat([hidden_RTC, more_RTC], 1)
    rows_M, _ = (ids_RT >= 0).nonzero(as_tuple=True)
    hidden_MC, ids_M = hidden_RTC[ids_RT >= 0], ids_RT[ids_RT >= 0]
    losses = []
    with head_of(model) as head:
        for start in range(0, len(ids_M), ROWS):
            logits_MV = head(hidden_MC[None, start : start + ROWS])[0].float()
            losses.append(nn.functional.cross_entropy(logits_MV, ids_M[start : start + ROWS], reduction="none"))
    sums_R = torch.zeros(len(rests), dtype=torch.float64)
    sums_R.index_add_(0, rows_M.cpu(), torch.cat(losses).double().cpu())
    return [tuple(row) for row in (-sums_R).reshape(-1, options).tolist()]
