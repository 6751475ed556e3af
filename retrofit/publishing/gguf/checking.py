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
from retrofit.publishing.gguf.reading import GgufReading, Passage
from retrofit.recipe.values import GgufType

if TYPE_CHECKING:
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
    """What the folder itself gives: a loss for every token of passages in nats, its vocabulary, how it splits TEXTS."""

    passages: tuple[Passage, ...]
    beyond: Passage | None
    losses: tuple[np.ndarray, ...]
    beyond_losses: np.ndarray | None
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
        return math.exp(float(np.concatenate(self.losses).mean()))


@dataclass(frozen=True)
class Distance:
    """Differences of losses (that is, of the log-probabilities of the tokens that follow) in nats: of their mean, and
    on average and at most of a token."""

    mean: float
    token: float
    largest: float


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
    from retrofit.evaluation.scoring.score import score
    from retrofit.model.load import load_model

    passages = tuple(Passage(tuple(one.input_ids[:tokens].tolist())) for one in documents)
    beyond = _beyond(model, documents)
    asked = [*passages, *([beyond] if beyond else [])]
    scored = score(
        load_model(model.path, device=device, dtype="float32"),
        [Document(f"passage {i}", "gguf", np.asarray(one.ids, np.int64), 0) for i, one in enumerate(asked)],
        progress=progress,
    )
    losses = [np.asarray(one, np.float64) for one in scored.losses]
    tokenizer = model.tokenizer
    return Reference(
        passages=passages,
        beyond=beyond,
        losses=tuple(losses[: len(passages)]),
        beyond_losses=losses[-1][beyond.first :] if beyond else None,
        vocabulary=tokenizer.get_vocab(),
        added=frozenset(tokenizer.get_added_vocab()),
        texts=tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS),
        template=_template(tokenizer),
        rows=model.config.get_text_config().vocab_size,
        window=model.spec.max_position_embeddings,
        folder=model.path,
    )


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
    if len(reading.vocabulary) != reference.rows:
        raise _another(
            f"{len(reading.vocabulary):,} tokens, and the folder {reference.rows:,}: another tokenizer", name
        )
    for text, index in sorted(reference.vocabulary.items(), key=lambda item: item[1]):
        # Added tokens may stand there as they are shown, with plain spaces.
        if text not in reference.added and index < reference.rows and reading.vocabulary[index] != text:
            found = shown(reading.vocabulary[index], 40)
            raise _another(f"`{found}` as token {index}, and the folder `{shown(text, 40)}`: another tokenizer", name)
    for text, ours, theirs in zip(TEXTS, reference.texts, reading.texts, strict=True):
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            raise _another(f"a tokenizer that splits {text[:30]!r}... differently from token {at} on", name)


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
    found = np.concatenate(reading.losses[: len(reference.passages)])
    wanted = np.concatenate(reference.losses)
    if not np.isfinite(found).all():
        raise UserError("llama.cpp computes losses that are not numbers", where=shown(name), fix="ask for another type")
    distance = distance_of(found, wanted)
    if stored:
        require_same_function(distance, name, "in its first tokens")
        if reference.beyond is not None and reference.beyond_losses is not None:
            far = distance_of(reading.losses[-1], reference.beyond_losses)
            require_same_function(far, name, f"after {len(reference.beyond.ids) - BEYOND:,} tokens")
    nbytes = path.stat().st_size
    ppl = math.exp(float(found.mean()))
    return GgufFile(kind, name, nbytes, 8 * nbytes / reading.parameters, ppl, ppl / reference.ppl, distance)


def distance_of(found: np.ndarray, wanted: np.ndarray) -> Distance:
    """How far losses are from those that are wanted."""
    assert found.shape == wanted.shape, f"{found.shape} losses for {wanted.shape}"
    difference = found - wanted
    return Distance(float(difference.mean()), float(np.abs(difference).mean()), float(np.abs(difference).max()))


def require_same_function(distance: Distance, name: str, place: str) -> None:
    """UserError where a file with the folder's own weights computes something else in llama.cpp."""
    if abs(distance.mean) <= MEAN and distance.token <= TOKEN:
        return
    raise UserError(
        f"llama.cpp computes something else than this folder {place}: the mean loss differs by {distance.mean:+.3g} "
        f"nats, a token's by {distance.token:.3g} on average and {distance.largest:.3g} at most",
        where=shown(name),
        fix="leave GGUF out, or extend with --method ntk, which every engine reads; `retrofit inspect` says what "
        "llama.cpp reads",
    )
