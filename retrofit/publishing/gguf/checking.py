"""Compare a GGUF file, as llama.cpp reads it, with the checkpoint folder that it was made from.

The folder is scored by stock transformers in float32. The file with the folder's own weights has to give the same
log-probabilities, or llama.cpp computes another model; what a quantisation loses is measured beside it and stated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.evaluation.long_context import native_length
from retrofit.publishing.gguf.reading import GgufReading, Passage, Scored
from retrofit.recipe.values import GgufType

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retrofit.console import Progress
    from retrofit.model.folder import ModelFolder

TEXTS = (
    "The café’s owner said: “It’s 3.14159, isn't it?”  Yes — 12345678 times.\n\n\tdef f(x):\n        return x ** 2\n",
    "Straße, 東京, Москва, ١٢٣ and 🙂🤝🏽 \u00a0| http://example.org/a_b?c=1&d=2 |   trailing spaces   ",
)
"""What tokenizers split in different ways: digits, contractions, code, white space, other scripts."""
BEYOND = 256
"""Tokens scored at the end of a passage that is longer than the window before an extension, or a sliding window."""
MEAN, TOKEN = 0.02, 0.05
"""Most nats by which the mean loss, and on average the loss of a token, of the file with the folder's own weights may
differ from the folder's. SmolLM2-135M: 4e-5 and 2e-3 in f16; past its original window, in bf16, 1e-4 and 0.013."""


@dataclass(frozen=True)
class Reference:
    """What the folder itself gives: losses and most probable tokens of passages, its vocabulary, how it splits
    TEXTS."""

    passages: tuple[Passage, ...]
    beyond: Passage | None
    scored: tuple[Scored, ...]
    beyond_scored: Scored | None
    vocabulary: Mapping[str, int]
    added: frozenset[str]
    texts: tuple[tuple[int, ...], ...]
    template: str | None
    rows: int
    window: int
    folder: Path

    @property
    def ppl(self) -> float:
        """Perplexity of the passages."""
        return math.exp(float(np.concatenate([one.losses for one in self.scored]).mean()))


@dataclass(frozen=True)
class Distance:
    """Differences of losses (that is, of the log-probabilities of the tokens that follow) in nats: of their mean, and
    on average and at most of a token. greedy: share of positions with the same most probable token."""

    mean: float
    token: float
    largest: float
    greedy: float


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was compared. bits: of a weight, on average. ppl: of the same tokens as the folder's, ratio:
    over the folder's; distance: from the folder."""

    kind: GgufType
    name: str
    nbytes: int
    bits: float
    ppl: float
    ratio: float
    distance: Distance


def reference_of(
    model: ModelFolder, documents: Sequence[Document], tokens: int, *, device: str, progress: Progress | None = None
) -> Reference:
    """Score the first `tokens` tokens of every document, and what lies past the original window, in float32."""
    from retrofit.model.load import load_model

    passages = tuple(Passage(tuple(one.input_ids[:tokens].tolist())) for one in documents)
    beyond = _beyond(model, documents)
    asked = [*passages, *([beyond] if beyond else [])]
    scored = _scored(load_model(model.path, device=device, dtype="float32"), asked, progress)
    if not all(np.isfinite(one.losses).all() for one in scored):
        raise UserError(
            "this folder's own losses are not numbers", where=shown(model.path), fix="retrofit inspect says why"
        )
    tokenizer = model.tokenizer
    return Reference(
        passages=passages,
        beyond=beyond,
        scored=tuple(scored[: len(passages)]),
        beyond_scored=scored[-1] if beyond else None,
        vocabulary=tokenizer.get_vocab(),
        added=frozenset(tokenizer.get_added_vocab()),
        texts=tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS),
        template=_template(tokenizer),
        rows=model.config.get_text_config().vocab_size,
        window=model.spec.max_position_embeddings,
        folder=model.path,
    )


def _scored(model: PreTrainedModel, passages: Sequence[Passage], progress: Progress | None) -> list[Scored]:
    """Every passage in one pass of its own."""
    import torch

    from retrofit.evaluation.scoring.reader import Reader
    from retrofit.evaluation.scoring.score import reading
    from retrofit.model.frequencies import frequencies_of

    found = []
    with reading(model, None, progress):
        if progress:
            progress.start("score the folder itself", sum(len(one.ids) for one in passages), "tokens")
        for one in passages:
            reader, losses, greedy = Reader(model, len(one.ids)), [], []
            ids_T = torch.tensor(one.ids, device=model.device)
            with frequencies_of(model, len(one.ids)):
                for offset, hidden_1TC in reader.hidden(ids_T[:-1]):
                    for row in range(0, hidden_1TC.shape[1], reader.rows):
                        logits_RV = reader.logits(hidden_1TC[:, row : row + reader.rows])
                        next_R = ids_T[offset + row + 1 :][: len(logits_RV)]
                        losses.append(torch.nn.functional.cross_entropy(logits_RV, next_R, reduction="none").cpu())
                        greedy.append(logits_RV.argmax(-1).cpu())
                    if progress:
                        progress.advance(hidden_1TC.shape[1])
            ours = Scored(torch.cat(losses).double().numpy(), torch.cat(greedy).numpy())
            found.append(Scored(ours.losses[one.first :], ours.greedy[one.first :]))
        if progress:
            progress.finish()
    return found


def _beyond(model: ModelFolder, documents: Sequence[Document]) -> Passage | None:
    """A passage that ends where only a reader of the whole encoding computes the same; None where there is no such
    place, or not enough text."""
    windows = [layer.window for layer in model.spec.layers if layer.window]
    special = max([native_length(model), *windows])
    ids = np.concatenate([document.input_ids for document in documents])
    stop = min(special + BEYOND, model.spec.max_position_embeddings)
    if stop <= special or len(ids) < stop:
        return None
    return Passage(tuple(ids[:stop].tolist()), stop - 1 - BEYOND)


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


def require_same_model(reading: GgufReading, reference: Reference, name: str) -> None:
    """UserError where the file has another tokenizer, chat template or window than the folder."""
    _require_same_tokenizer(reading, reference, name)
    architecture = reading.metadata.get("general.architecture", "")
    window = reading.metadata.get(f"{architecture}.context_length")
    if window != str(reference.window):
        raise _another(f"a window of {shown(window, 40)} tokens, and the folder has {reference.window}", name)
    template = reading.metadata.get("tokenizer.chat_template")
    if reference.template is not None and template != reference.template:
        raise _another("another chat template than the folder" if template else "no chat template", name)


def _require_same_tokenizer(reading: GgufReading, reference: Reference, name: str) -> None:
    other = other_vocabulary(reading.vocabulary, reference.vocabulary, reference.added, reference.rows)
    if other is not None:
        raise _another(f"{other}: another tokenizer", name)
    for text, ours, theirs in zip(TEXTS, reference.texts, reading.texts, strict=True):
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            raise _another(f"a tokenizer that splits {text[:30]!r}... differently from token {at} on", name)


def other_vocabulary(
    tokens: Sequence[str], vocabulary: Mapping[str, int], added: frozenset[str], rows: int
) -> str | None:
    """Where the tokens of a file are not those of a folder with `rows` of them; None where they are."""
    if len(tokens) != rows:
        return f"{len(tokens):,} tokens, and the folder {rows:,}"
    for text, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        # Added tokens may stand there as they are shown, with plain spaces.
        if text not in added and index < rows and tokens[index] != text:
            return f"`{shown(tokens[index], 40)}` as token {index}, and the folder `{shown(text, 40)}`"
    return None


def _another(what: str, name: str) -> UserError:
    return UserError(
        f"this GGUF file is not of this folder: it has {what}",
        where=shown(name),
        fix="give the folder that the file was made from, or make the file from this folder: retrofit export",
    )


def compared(
    path: Path, kind: GgufType, reading: GgufReading, reference: Reference, *, stored: bool, name: str | None = None
) -> GgufFile:
    """How far a file is from its folder. stored: it holds the folder's own weights, so that it has to be the same
    function. Raises UserError where it is not, and for losses that are not numbers."""
    name = name or path.name
    found = reading.scored[: len(reference.passages)]
    if not all(np.isfinite(one.losses).all() for one in found):
        raise UserError("llama.cpp computes losses that are not numbers", where=shown(name), fix="ask for another type")
    distance = distance_of(found, reference.scored)
    if stored:
        require_same_function(distance, name, "in its first tokens")
        if reference.beyond is not None and reference.beyond_scored is not None:
            far = distance_of(reading.scored[-1:], [reference.beyond_scored])
            require_same_function(far, name, f"after {len(reference.beyond.ids) - BEYOND:,} tokens")
    nbytes = path.stat().st_size
    ppl = math.exp(float(np.concatenate([one.losses for one in found]).mean()))
    return GgufFile(kind, name, nbytes, 8 * nbytes / reading.parameters, ppl, ppl / reference.ppl, distance)


def distance_of(found: Sequence[Scored], wanted: Sequence[Scored]) -> Distance:
    """How far passages are from those that are wanted."""
    difference = np.concatenate([a.losses - b.losses for a, b in zip(found, wanted, strict=True)])
    same = np.concatenate([a.greedy == b.greedy for a, b in zip(found, wanted, strict=True)])
    size = np.abs(difference)
    return Distance(float(difference.mean()), float(size.mean()), float(size.max()), float(same.mean()))


def require_same_function(distance: Distance, name: str, place: str) -> None:
    """UserError where a file with the folder's own weights computes something else in llama.cpp."""
    if abs(distance.mean) <= MEAN and distance.token <= TOKEN:
        return
    raise UserError(
        f"llama.cpp computes something else than this folder {place}: the mean loss differs by {distance.mean:+.3g} "
        f"nats, a token's by {distance.token:.3g} on average and {distance.largest:.3g} at most",
        where=shown(name),
        fix="leave GGUF out; `retrofit inspect` says what llama.cpp computes otherwise, and which method it reads "
        "(ntk reaches most engines)",
    )
