"""Greedy continuations of a few short prompts: what the numbers of two models look like as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.evaluation.tasks.haystack import encode
from retrofit.model.families import describe
from retrofit.system.dealing import collected, own_share
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.data.documents import Document
    from retrofit.kernels.registry import KernelChoice

PROMPTS = (
    "Water can be a solid, a liquid or a gas. When it is heated to 100 degrees,",
    "On the first morning of the holiday the children went down to the river, and",
)
"""Built in, the same for every model."""
PROMPT_TOKENS = 48
"""Of the first document: a prompt as long as its beginning."""


@dataclass(frozen=True)
class Continuation:
    """What a model writes after a prompt, the likeliest token each time.

    source: name of the document that the prompt is the beginning of; empty for a built-in one. tokens: written.
    """

    prompt: str
    text: str
    tokens: int
    source: str = ""


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    tokens: int,
    kernel: KernelChoice | None = None,
    world: World = ALONE,
) -> tuple[Continuation, ...]:
    """Return the greedy continuations of the built-in prompts and of the beginning of the first document.

    tokens: to write after each; fewer where the model ends its text or its learned positions end. A prompt that these
    cannot hold is left out. Empty for 0. world: the processes that make this call and share the prompts.
    """
    if tokens < 1:
        return ()
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [(text, "", [*bos, *encode(tokenizer, text)]) for text in PROMPTS]
    for document in documents[:1]:
        ids = document.input_ids[:PROMPT_TOKENS].tolist()
        prompts.append((_text(tokenizer, ids), document.name, ids))
    from retrofit.evaluation.scoring.score import reading

    room, stop = describe(model.config).learned_positions, _ends(model, tokenizer)
    prompts = [prompt for prompt in prompts if room is None or len(prompt[2]) <= room]
    written = {}
    with reading(model, kernel, None):
        for index in own_share(dict.fromkeys(range(len(prompts)), 1.0), world):
            written[index] = _greedy(model, prompts[index][2], tokens, stop)
    written = collected(written, world)
    return tuple(
        Continuation(text, _text(tokenizer, written[index]), len(written[index]), source)
        for index, (text, source, _) in enumerate(prompts)
    )


def _greedy(model: PreTrainedModel, ids: Sequence[int], tokens: int, stop: frozenset[int]) -> list[int]:
    import torch

    from retrofit.evaluation.scoring.reader import Reader
    from retrofit.model.frequencies import frequencies_of

    reader = Reader(model, len(ids) + tokens)
    with frequencies_of(model, len(ids) + tokens):
        reader.read(torch.tensor(ids, dtype=torch.int64, device=model.device))
        return reader.greedy(tokens, stop)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int))


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
