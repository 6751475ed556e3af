"""From what is kept of each model, token losses and answers, to the numbers that people read. One place for both: a run
of several models, and one model alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from retrofit.evaluation.continuations import Continuation
from retrofit.evaluation.folders import run_costs
from retrofit.evaluation.long_context import NATIVE, conclude
from retrofit.evaluation.metrics.context_use import LongContext
from retrofit.evaluation.metrics.effective import short_context
from retrofit.evaluation.metrics.frequency import FrequencyBand, by_frequency, shared_length
from retrofit.evaluation.metrics.perplexity import loss_by_position, table
from retrofit.evaluation.result import ModelEvaluation
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.tasks.answers import TaskAnswers, changes
from retrofit.evaluation.tasks.within import not_asked
from retrofit.model.cache_dtype import cache_bytes
from retrofit.model.folder import ModelFolder
from retrofit.model.spec import cache_lengths
from retrofit.recipe.schema import Evaluate


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of one model: token losses, those of further passes, what its tests answered, and its kernel."""

    losses: TokenLosses
    passes: Mapping[str, TokenLosses]
    answers: LongContext
    kernel: str
    reason: str
    continuations: tuple[Continuation, ...]
    tasks: Mapping[str, TaskAnswers]


def summary(
    folders: Mapping[str, ModelFolder],
    kept: Mapping[str, Kept],
    section: Evaluate,
    *,
    native: int,
    claimed: int,
    kernel: str,
    device: str,
    seed: int,
) -> tuple[ModelEvaluation, ...]:
    """The numbers of every model, those of the original first. folders, kept: by label. native, claimed: positions
    of the original, and of the last. kernel, device, seed: as the recipe has them."""
    costs = run_costs(folders, section, kernel=kernel, device=device, seed=seed)
    original = next(iter(kept.values()))
    how: dict[str, Any] = {"resamples": section.resamples, "seed": seed}
    models = []
    for label, one in kept.items():
        folder, changed = folders[label], one is not original
        size, stored = folder.dtype("auto").itemsize, section.kv_cache_dtype
        lengths = sorted({*section.lengths, *cache_lengths(claimed)})
        windows = tuple(one.spec.max_position_embeddings for one in (next(iter(folders.values())), folder))
        models.append(
            ModelEvaluation(
                label=label,
                rows=tuple(table(one.losses, section.lengths, tail=section.tail, **how)),
                kernel=one.kernel,
                reason=one.reason,
                dtype=str(one.losses.meta["dtype"]),
                kv_heads=folder.spec.layers[0].kv_heads,
                kv_cache_dtype=stored,
                kv_bytes_per_token=cache_bytes(folder.spec, 1, stored, size),
                kv_cache_bytes={length: cache_bytes(folder.spec, length, stored, size) for length in lengths},
                claimed_length=folder.spec.max_position_embeddings,
                cost=costs[label],
                position_losses=loss_by_position(one.losses.prose().losses),
                long_context=conclusion(one, section, native, original if len(kept) > 1 else None, seed),
                short_context=tuple(short_context(original.losses, one.losses, section.lengths, native, **how))
                if changed
                else (),
                by_frequency=_by_frequency(original.losses, one.losses, section, windows, how) if changed else (),
                seen=one.losses.seen,
                tasks=tuple(row for answers in one.tasks.values() for row in answers.rows()),
                not_asked={name: answers.not_asked for name, answers in one.tasks.items() if answers.not_asked},
                continuations=one.continuations,
                task_changes=tuple(
                    row for name, answers in one.tasks.items() for row in changes(original.tasks[name], answers, **how)
                )
                if changed
                else (),
            )
        )
    return tuple(models)


def _by_frequency(
    before: TokenLosses, after: TokenLosses, section: Evaluate, windows: tuple[int, ...], how: Mapping[str, Any]
) -> tuple[FrequencyBand, ...]:
    """At the longest measured length that both windows hold."""
    length = shared_length(section.lengths, windows)
    return () if length is None else by_frequency(before, after, length, **how)


def conclusion(one: Kept, section: Evaluate, native: int, original: Kept | None, seed: int) -> LongContext:
    """What the stored arrays and answers of one model say about its use of context."""
    found = conclude(
        one.losses,
        one.passes,
        section,
        native,
        needle=one.answers.needle.scores if one.answers.needle else None,
        original=(original.losses, original.passes) if original and NATIVE in original.passes else None,
        seed=seed,
    )
    needle, ruler = one.answers.needle, one.answers.ruler
    missing = not_asked(section, needle, ruler)
    return replace(found, defined=one.answers.defined, needle=needle, ruler=ruler, not_asked=missing)
