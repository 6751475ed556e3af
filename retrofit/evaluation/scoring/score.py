"""The scoring pass: every token loss of whole documents, in chunks.

A chunk of tokens goes through the base model against a preallocated KV cache, its hidden states through the class's own
head in rows, and each row to one float (`reader.py`). For a static position encoding the losses at every length up to
the longest are prefixes of this one pass; for `dynamic` and `longrope` each length is a pass of its own. Under
`windows` every token is scored once, in the pass over the first window that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from retrofit.data.documents import Document, documents_digest, make_documents, tokenizer_digest
from retrofit.errors import UserError
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.passes import Pass, Plan, advance, plan_of
from retrofit.evaluation.scoring.reader import Reader, default_chunk, default_rows, require_positions
from retrofit.evaluation.scoring.sharded import ShardedReader
from retrofit.evaluation.scoring.windows import Windows
from retrofit.kernels.registry import KernelChoice, scoring_kernel, split_kernel, using
from retrofit.model.families import describe
from retrofit.model.frequencies import varying
from retrofit.system.dealing import collected, own_share
from retrofit.system.resume import DISCARDED, Kept
from retrofit.system.sequence_groups import SequenceGroups
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from retrofit.console import Progress

__all__ = ["Document", "TokenLosses", "make_documents", "reading", "score", "tokenizer_digest"]


def score(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    windows: Windows | None = None,
    lengths: Sequence[int] = (),
    known: TokenLosses | None = None,
    chunk: int | None = None,
    logits_rows: int | None = None,
    kernel: KernelChoice | None = None,
    meta: Mapping[str, object] | None = None,
    partial: Path | None = None,
    world: World = ALONE,
    sequences: SequenceGroups | None = None,
    progress: Progress | None = None,
) -> TokenLosses:
    """Token losses of every document: l_i = -log_softmax(logits_{i-1})[token i], log-softmax in fp32.

    windows: how much context each token gets; by default all that stands before it. lengths: the context lengths that
    will be asked for; only a position encoding that changes with the length needs them, and costs a pass for each.
    known: losses of whole documents under the same model, whose first `windows.length` tokens are then not read again.
    chunk: tokens per forward pass. logits_rows: rows of logits [rows, V] that exist at one time. Both are by default
    what suits the device. kernel: by default blockwise where it can express the model's attention, else an exact stock
    one. meta: what to record beside the kernel, dtype, chunk and digest of the documents. partial: a folder where
    finished documents are kept until all are, for the next call with the same question. world: the processes that make
    this call, each with the model; a pass over a document is made by one of them, and all return all losses. sequences:
    groups of these processes that make it together instead, each with a share of the tokens. progress: of what this
    process reads. The model's attention kernel is put back afterwards.

    Raises: UserError for a position encoding that changes with the length when no lengths are given, for a document
    beyond the model's absolute positions, for a kernel or attention that cannot be split among `sequences`, and for a
    loss that is not finite (names document and position).
    """
    model = getattr(model, "get_base_model", lambda: model)()  # of a peft model: the model its adapters sit in
    chunk, logits_rows = chunk or default_chunk(model), logits_rows or default_rows(model)
    known = known if varying(model.config) is None else None  # their frequencies are those of another length
    plans = [plan_of(model, document, windows, lengths) for document in documents]
    _require_scorable(model, documents, plans, windows is not None or bool(lengths))
    with reading(model, kernel, progress) if sequences is None else _reading_together(model, kernel) as used:
        facts = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernel": used,
            "chunk": chunk if sequences is None else None,
            "context": max((span.tokens for plan in plans for _, spans in plan for span in spans), default=0),
            "windows": asdict(windows) if windows else None,
            "documents_sha256": documents_digest(documents),
            "texts_sha256": [document.text_sha256 for document in documents],
            **(meta or {}),
        }
        how = {"device": model.device.type, "rows": logits_rows, "lengths": list(lengths)}
        kept = Kept(partial, {**facts, **how}, world)
        if kept.discarded and progress:
            progress.note(f"{DISCARDED}; scored anew")
        passes = {
            f"{i}@{length}": Pass(i, document, length, spans, None if known is None else known.losses[i])
            for i, (document, plan) in enumerate(zip(documents, plans, strict=True))
            for length, spans in plan
        }
        found = kept.arrays(passes)
        left = {name: one.tokens_read for name, one in passes.items() if name not in found}
        own = own_share(left, world if sequences is None else sequences.world)
        if progress:
            progress.start("score", sum(passes[name].tokens for name in (*found, *own)), "tokens")
        for name in found:
            advance(progress, passes[name].tokens, passes[name].document)
        scored = {}
        for name in own:
            reader: Reader | ShardedReader
            if sequences is None:
                reader = Reader(model, passes[name].longest, chunk=chunk, rows=logits_rows)
            else:
                reader = ShardedReader(model, sequences.group, rows=logits_rows)
            losses = passes[name].scored(reader, progress)
            if sequences is None or sequences.first:
                scored[name] = losses
                kept.put(name, losses)
        found |= collected(scored, world)
        if progress:
            progress.finish()
    by_document: list[dict[int, np.ndarray]] = [{} for _ in documents]
    for name, one in passes.items():
        by_document[one.index][one.length] = found[name]
    varies = varying(model.config)
    several = varies is not None and bool(lengths) and windows is None
    if varies:
        facts["frequencies"] = {"rope_type": varies[0], "static_until": varies[1]}
    return TokenLosses(
        documents=tuple(document.name for document in documents),
        kinds=tuple(document.kind for document in documents),
        losses=tuple(list(one.values())[-1] for one in by_document),
        nbytes=tuple(document.nbytes for document in documents),
        token_bytes=tuple(
            _token_bytes(document)[: len(one[max(one)])] for document, one in zip(documents, by_document, strict=True)
        ),
        token_ids=tuple(
            document.input_ids[1:][: len(one[max(one)])].astype(np.int32)
            for document, one in zip(documents, by_document, strict=True)
        ),
        meta=facts,
        by_length={n: tuple(one[n] for one in by_document) for n in by_document[0]} if several else {},
        scored=tuple(
            None if document.scored is None else document.scored[1:][: len(one[max(one)])]
            for document, one in zip(documents, by_document, strict=True)
        )
        if any(document.scored is not None for document in documents)
        else (),
    )


@contextmanager
def reading(model: PreTrainedModel, kernel: KernelChoice | None, progress: Progress | None) -> Iterator[str]:
    """The model ready to read in chunks: no gradients, in eval mode, with a kernel that suits; gives its name."""
    with torch.inference_mode(), _evaluating(model), _kernel(model, kernel, progress) as used:
        yield used


@contextmanager
def _reading_together(model: PreTrainedModel, kernel: KernelChoice | None) -> Iterator[str]:
    """The same for a model that reads with others (`sharded`)."""
    dtype = str(model.dtype).removeprefix("torch.")
    requested = "auto" if kernel is None else kernel.requested
    choice = split_kernel(requested, describe(model.config), model.device.type, dtype)
    with torch.inference_mode(), _evaluating(model):
        yield choice.name


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _kernel(model: PreTrainedModel, asked: KernelChoice | None, progress: Progress | None) -> Iterator[str]:
    """Run with the kernel asked for, or the one that suits a chunked prefill; a fallback, and on a GPU the choice of
    tiles, is announced."""
    choice = asked or scoring_kernel(model)
    if asked is None and (choice.name != "blockwise" or model.device.type != "cpu") and progress:
        progress.note(choice.reason)
    with using(model, choice):
        yield choice.name


def _require_scorable(
    model: PreTrainedModel, documents: Sequence[Document], plans: Sequence[Plan], lengths_known: bool
) -> None:
    """lengths_known: of the whole sequences, so that an encoding that changes with them can be scored."""
    config = model.config
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
    for document, plan in zip(documents, plans, strict=True):
        if plan[-1][1][-1].stop > len(document.input_ids):
            raise UserError(
                f"perplexity at {plan[-1][0]} tokens needs documents of at least that many; this one has "
                f"{len(document.input_ids)}",
                where=document.name,
                fix="give a longer text, or ask for a shorter length",
            )
    _require_positions(model, documents, plans)
    varies = varying(config)
    if varies is not None and not lengths_known and len(longest.input_ids) > varies[1]:
        raise UserError(
            f"this position encoding changes with the length beyond {varies[1]} tokens, so one pass cannot score "
            f"the {len(longest.input_ids)} tokens of `{longest.name}`",
            where="rope_parameters.rope_type in config.json",
            fix=f"name the lengths, score at most {varies[1]} tokens, or use yarn, llama3, linear or a larger theta",
        )


def _require_positions(model: PreTrainedModel, documents: Sequence[Document], plans: Sequence[Plan]) -> None:
    try:
        end = describe(model.config).learned_positions
    except UserError:
        return  # of an architecture that is not described here; it fails by itself if it must
    for document, plan in zip(documents, plans, strict=True):
        require_positions(end, max(span.tokens for _, spans in plan for span in spans), document.name)


def _token_bytes(document: Document) -> np.ndarray:
    if document.token_bytes is None:
        return np.zeros(len(document.input_ids) - 1, np.int32)
    return document.token_bytes[1:]
