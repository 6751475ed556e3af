"""Checkpoint folders as they are evaluated: loaded with a kernel, scored, timed, and their kernel checked."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.data.documents import Document, tokenizer_digest
from retrofit.evaluation.continuations import continuations
from retrofit.evaluation.long_context import Measured, longest_prompt, measure, native_length
from retrofit.evaluation.running import COST_ROUNDS
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.reader import require_positions
from retrofit.kernels.check import KernelCheck, prove
from retrofit.kernels.registry import KernelChoice, apply, choose, split_kernel
from retrofit.kernels.rounded_cache import round_cache
from retrofit.model.cache_dtype import AUTO
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Evaluate
from retrofit.system.sequence_groups import sequence_groups
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retrofit.console import Progress
    from retrofit.evaluation.running import RunCost

PROOF_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Scored:
    """What one model was needed for. losses: of whole documents; measured: what was asked for beyond them."""

    losses: TokenLosses
    kernel: KernelChoice
    measured: Measured


def score_folder(
    model: ModelFolder,
    documents: Sequence[Document],
    section: Evaluate,
    *,
    label: str,
    kernel: str,
    device: str,
    native: int | None = None,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    seen: Mapping[str, Sequence[str]] | None = None,
    partial: Path | None = None,
    continuation_tokens: int = 0,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Scored:
    """Token losses of a checkpoint folder, and what else the section asks for.

    native: the length the original was made for; by default what the folder records. identity: digests of the
    checkpoint, recorded with the losses. seen: by kind of text, what the model was made on text of it for, recorded as
    well. partial: where finished documents are kept until all are.
    continuation_tokens: to write after a few prompts. world: the processes that make this call; what is read is dealt
    out to them, and all return all of it; the documents themselves are read by groups of `section.sequence_parallel`.

    Raises UserError, before anything is read, where learned positions end before the longest length.
    """
    require_positions(model.spec.learned_positions, longest_prompt(section), str(model.path))
    loaded, choice = ready(model, section, kernel, device)
    tokenizer, reading, sequences = model.tokenizer, choice, None
    if section.sequence_parallel > 1:
        sequences = sequence_groups(world, section.sequence_parallel)
        reading = split_kernel(choice.requested, model.spec, device, str(loaded.dtype).removeprefix("torch."))
    if progress:
        progress.note(f"{label}: kernel {reading.name}, {reading.reason}")
        if tokenizer.bos_token_id is None:
            progress.note("this tokenizer has no BOS: the first token of every document is given, not predicted")
    meta: dict[str, object] = {
        "model": label,
        "positions": model.spec.max_position_embeddings,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "seen": {kind: list(purposes) for kind, purposes in (seen or {}).items()},
    }
    if section.kv_cache_dtype != AUTO:
        meta["kv_cache_dtype"] = section.kv_cache_dtype
    if identity:
        meta["checkpoint"] = dict(identity)
    asked = None if choice.requested == "auto" else choice
    longest = max(section.lengths)  # only moving windows read what lies beyond
    from retrofit.evaluation.scoring.score import score

    losses = score(
        loaded,
        [document.cut(longest) for document in documents],
        lengths=section.lengths,
        chunk=section.chunk,
        kernel=asked,
        meta=meta,
        partial=partial / "full" if partial else None,
        world=world,
        sequences=sequences,
        progress=progress,
    )
    measured = measure(
        loaded,
        tokenizer,
        documents,
        losses,
        section,
        native_length(model) if native is None else native,
        kernel=asked,
        seed=seed,
        partial=partial,
        world=world,
        progress=progress,
    )
    written = continuations(loaded, tokenizer, documents, tokens=continuation_tokens, kernel=asked, world=world)
    del loaded
    gc.collect()
    return Scored(losses, reading, replace(measured, continuations=written))


def ready(model: ModelFolder, section: Evaluate, kernel: str, device: str) -> tuple[PreTrainedModel, KernelChoice]:
    """The model as it is evaluated, with the KV cache that the section asks for, and the kernel it has."""
    loaded, choice = _loaded(model, section, kernel, device)
    round_cache(loaded, section.kv_cache_dtype)
    return loaded, choice


def _loaded(model: ModelFolder, section: Evaluate, kernel: str, device: str) -> tuple[PreTrainedModel, KernelChoice]:
    loaded = model.load(dtype=model.working_dtype(section.dtype, device), device=device)
    choice = kernel_for(loaded, model, kernel, device)
    apply(loaded, choice)
    return loaded, choice


def run_costs(
    models: Mapping[str, ModelFolder],
    section: Evaluate,
    *,
    kernel: str,
    device: str,
    seed: int,
) -> Mapping[str, RunCost | None]:
    """What the first and the last checkpoint folder cost to run, measured in turn; None for those between them, and
    where the section asks for no lengths; with their own KV cache. Nothing else should run meanwhile."""
    if not section.cost_lengths:
        return dict.fromkeys(models)
    from retrofit.evaluation.cost import side_by_side

    def load(model: ModelFolder) -> PreTrainedModel:
        return _loaded(model, section, kernel, device)[0]

    compared = [label for i, label in enumerate(models) if i in (0, len(models) - 1)]
    loaders = {label: functools.partial(load, models[label]) for label in compared}
    rounds = COST_ROUNDS if len(loaders) > 1 else 1
    found = side_by_side(
        loaders, section.cost_lengths, section.decode_tokens, rounds=rounds, batches=section.cost_batches, seed=seed
    )
    return {label: found.get(label) for label in models}


def prove_kernel(model: ModelFolder, document: Document, *, kernel: str, device: str) -> KernelCheck:
    """Compare the kernel's logits with eager's on a short text: in float32 on a CPU, where rounding hides nothing."""
    import torch

    loaded = model.load(dtype="float32" if device == "cpu" else "auto", device=device)
    ids = torch.from_numpy(document.input_ids[:PROOF_TOKENS])[None].to(device)
    return prove(loaded, kernel_for(loaded, model, kernel, device), ids)


def kernel_for(loaded: PreTrainedModel, model: ModelFolder, kernel: str, device: str) -> KernelChoice:
    """The kernel that `kernel` becomes for the loaded model of a folder."""
    return choose(kernel, model.spec, device, dtype=str(loaded.dtype).removeprefix("torch."))
