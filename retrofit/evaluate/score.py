"""The scoring pass: every token loss of whole documents, in chunks.

A chunk of tokens goes through the base model against a preallocated KV cache, its hidden states through the class's own
head in rows, and each row to one float. For a static position encoding the losses at every length up to the longest
are prefixes of this one pass. Nothing of size tokens x vocabulary or tokens x tokens exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from retrofit.errors import UserError
from retrofit.evaluate.cache import preallocated_cache
from retrofit.evaluate.documents import make_documents, tokenizer_digest
from retrofit.evaluate.losses import Document, TokenLosses, documents_digest
from retrofit.kernels.registry import Choice, scoring_kernel, using

if TYPE_CHECKING:
    from retrofit.console import Progress

__all__ = ["Document", "TokenLosses", "make_documents", "score", "tokenizer_digest"]

Head = Callable[[Tensor], Tensor]


def score(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    chunk: int = 512,
    logits_rows: int = 256,
    kernel: Choice | None = None,
    meta: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> TokenLosses:
    """Token losses of every document: l_i = -log_softmax(logits_{i-1})[token i], log-softmax in fp32.

    chunk: tokens per forward pass. logits_rows: rows of logits [rows, V] that exist at one time. kernel: by default
    blockwise where it can express the model's attention, else an exact stock one. meta: what to record beside the
    kernel, dtype, chunk and digest of the documents. The model's attention kernel is put back afterwards.

    Raises: UserError for a position encoding that changes with the length, for a document beyond the model's absolute
    positions, and for a loss that is not finite (names document and position).
    """
    model = getattr(model, "get_base_model", lambda: model)()  # of a peft model: the model its adapters sit in
    longest = max((len(document.input_ids) for document in documents), default=0)
    _require_scorable(model.config, documents)
    losses: list[np.ndarray] = []
    if progress:
        progress.start("score", sum(len(document.input_ids) for document in documents), "tokens")
    with torch.inference_mode(), _evaluating(model), _kernel(model, kernel, progress) as used:
        for document in documents:
            losses.append(_score_document(model, document, min(chunk, longest), logits_rows, progress))
    if progress:
        progress.finish()
    return TokenLosses(
        documents=tuple(document.name for document in documents),
        kinds=tuple(document.kind for document in documents),
        losses=tuple(losses),
        nbytes=tuple(document.nbytes for document in documents),
        token_bytes=tuple(_token_bytes(document) for document in documents),
        meta={
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernel": used,
            "chunk": chunk,
            "context": longest,
            "documents_sha256": documents_digest(documents),
            **(meta or {}),
        },
    )


def _score_document(
    model: PreTrainedModel, document: Document, chunk: int, rows: int, progress: Progress | None
) -> np.ndarray:
    """Losses float32 [T - 1] of one document."""
    ids_T = torch.from_numpy(document.input_ids).to(model.device)
    total = len(ids_T)
    losses_T = torch.empty(total - 1, dtype=torch.float32)
    cache = preallocated_cache(model.config, total, chunk)
    base = model.get_decoder()
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        hidden_1TC = base(input_ids=ids_T[None, start:stop], past_key_values=cache, use_cache=True).last_hidden_state
        predicted = min(stop, total - 1)
        with _head_of(model) as head:
            for row in range(start, predicted, rows):
                end = min(row + rows, predicted)
                logits_RV = head(hidden_1TC[:, row - start : end - start])[0].float()
                targets_R = ids_T[row + 1 : end + 1]
                losses_T[row:end] = nn.functional.cross_entropy(logits_RV, targets_R, reduction="none").cpu()
        _require_finite(losses_T[start:predicted], start, document, model.dtype)
        if progress:
            progress.advance(stop - start, document=document.name)
    return losses_T.numpy()


class _Outputs(tuple[Tensor]):
    """(hidden states,); every other field an output may have (cache, router logits, ...) is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _GivenHidden(nn.Module):
    """Stands in for the base model and returns the hidden states it is given."""

    def forward(self, *_: object, inputs_embeds: Tensor | None = None, **__: object) -> _Outputs:
        assert inputs_embeds is not None
        return _Outputs((inputs_embeds,))


@contextmanager
def _head_of(model: PreTrainedModel) -> Iterator[Head]:
    """hidden [B, T, C] -> logits [B, T, V] by the class's own code after its base model.

    So softcaps, logit scales and biases of the head are exactly those of `model(input_ids)`, for every class.
    """
    name = model.base_model_prefix
    base = getattr(model, name)
    setattr(model, name, _GivenHidden())
    try:
        yield lambda hidden_BTC: model(inputs_embeds=hidden_BTC, use_cache=False).logits
    finally:
        setattr(model, name, base)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _kernel(model: PreTrainedModel, asked: Choice | None, progress: Progress | None) -> Iterator[str]:
    """Run with the kernel asked for, or the one that suits a chunked prefill; a fallback is announced."""
    choice = asked or scoring_kernel(model)
    if asked is None and choice.name != "blockwise" and progress:
        progress.note(choice.reason)
    with using(model, choice):
        yield choice.name


def _require_scorable(config: PreTrainedConfig, documents: Sequence[Document]) -> None:
    longest = max(documents, key=lambda document: len(document.input_ids), default=None)
    if longest is None:
        raise UserError("there is no document to score", fix="name at least one text")
    shortest = min(documents, key=lambda document: len(document.input_ids))
    if len(shortest.input_ids) < 2:
        raise UserError(
            "a document needs at least two tokens to be scored", where=shortest.name, fix="give a longer text"
        )
    highest = max(int(document.input_ids.max()) for document in documents)
    if highest >= config.vocab_size:
        raise UserError(
            f"token {highest} is outside the model's vocabulary of {config.vocab_size}",
            fix="use the tokenizer that belongs to the model",
        )
    static_until = _static_length(config)
    if static_until is not None and len(longest.input_ids) > static_until:
        raise UserError(
            f"this position encoding changes with the length beyond {static_until} tokens, so one pass cannot score "
            f"the {len(longest.input_ids)} tokens of `{longest.name}`",
            where="rope_parameters.rope_type in config.json",
            fix=f"score at most {static_until} tokens, or use yarn, llama3, linear or a larger theta",
        )


def _static_length(config: PreTrainedConfig) -> int | None:
    """Tokens up to which the frequencies do not depend on the length; None when they never do."""
    stored = getattr(config, "rope_parameters", None) or {}
    layers = [stored] if "rope_type" in stored else [entry for entry in stored.values() if isinstance(entry, dict)]
    lengths = []
    for entry in layers:
        varies = entry.get("rope_type") == "dynamic" or (
            entry.get("rope_type") == "longrope" and entry.get("short_factor") != entry.get("long_factor")
        )
        if varies:
            lengths.append(entry.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(lengths, default=None)


def _require_finite(losses: Tensor, start: int, document: Document, dtype: torch.dtype) -> None:
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        position = start + int((~finite).nonzero()[0]) + 1
        raise UserError(
            f"the loss of token {position} is not a finite number (weights in {str(dtype).removeprefix('torch.')})",
            where=f"{document.name}, token {position}",
            fix="check the weights for NaN or infinity, or score in float32",
        )


def _token_bytes(document: Document) -> np.ndarray:
    if document.token_bytes is None:
        return np.zeros(len(document.input_ids) - 1, np.int32)
    return document.token_bytes[1:]
