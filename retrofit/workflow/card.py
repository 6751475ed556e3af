"""From a run to what its model card is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import read_config
from retrofit.checkpoint.provenance import versions
from retrofit.context.engines import tried
from retrofit.context.fields import text_part
from retrofit.context.names import OLDER
from retrofit.model.families import stock_class
from retrofit.model.license import languages_and_tags
from retrofit.publishing.card_input import CardInput, CardModel, Recovery, Windows
from retrofit.publishing.reload import Tolerance
from retrofit.publishing.requirements import snippet_of, terms_of
from retrofit.recipe.load import dump_recipe
from retrofit.recipe.schema import Publish, Recipe
from retrofit.report.data import RunData
from retrofit.report.sections.costs import decoding_together
from retrofit.windows import sentences
from retrofit.workflow.artifact import Artifact
from retrofit.workflow.public import public_model, public_recipe

if TYPE_CHECKING:
    from retrofit.workflow.context import ModelContext


@dataclass(frozen=True)
class Changes:
    """How a model was changed: the method that merged its heads, the one that lengthened its context, of how many
    encodings that were tried, and its training; None for what was left as it was."""

    conversion: str | None = None
    context_method: str | None = None
    encodings_tried: int = 0
    recovery: Recovery | None = None


def card_input(
    context: ModelContext,
    artifact: Artifact,
    folder: Path,
    section: Publish,
    data: RunData,
    changes: Changes,
    allowed: Tolerance,
    *,
    chart: str | None,
) -> CardInput:
    """What the card of `folder`, a copy of `artifact`, says. allowed: of the proof in a fresh process. chart: a file of
    the folder."""
    recipe, source = context.recipe, context.source
    config, before, after = artifact.model.config, context.spec, artifact.model.spec
    first = data.models[0]
    assert data.native_length
    assert data.claimed_length
    base, terms = section.base_model or source.base_model, terms_of(section, source)
    size = artifact.model.dtype("auto").itemsize
    languages, tags = languages_and_tags(source.folder)
    return CardInput(
        title=title(recipe, base or public_model(source), data.claimed_length),
        base_model=base,
        license=terms.license,
        license_name=terms.name,
        license_link=terms.link,
        architecture=stock_class(config),
        dtype=str(config.dtype).removeprefix("torch."),
        layers=len(before.layers),
        kv_heads=(before.layers[0].kv_heads, after.layers[0].kv_heads),
        native_length=data.native_length,
        claimed_length=data.claimed_length,
        models=tuple(
            CardModel(model.label, model.rows, model.tasks, model.task_changes, model.not_asked, model.by_frequency)
            for model in data.models
        ),
        kv_cache_bytes={
            n: (before.kv_cache_bytes(n, size), after.kv_cache_bytes(n, size)) for n in first.kv_cache_bytes
        },
        recipe_yaml=dump_recipe(public_recipe(recipe, source)),
        commands=data.commands,
        versions=versions(),
        snippet=snippet_of(artifact.model.tokenizer, config, folder),
        conversion=recipe.convert.method if recipe.convert else changes.conversion,
        windows=_windows(data),
        context_method=changes.context_method,
        encodings_tried=changes.encodings_tried,
        effective=data.models[-1].effective,
        recovery=changes.recovery,
        revision=source.revision,
        chart=chart,
        kernel=data.kernel,
        languages=languages,
        tags=tags,
        tolerance=(allowed.token, allowed.mean),
        speed=decoding_together(data),
        seen=data.models[-1].seen,
        tried=tried(config),
        older_names=tuple(name for name in OLDER if name in text_part(read_config(folder))[1]),
    )


def _windows(data: RunData) -> Windows | None:
    if data.windows is None:
        return None
    found = data.windows
    return Windows(
        len(sentences.windowed(found)), *(part(found) for part in (sentences.layers, sentences.sinks, sentences.losses))
    )


def changes_of(recipe: Recipe, data: RunData) -> Changes:
    """What a run changed."""
    longer, training = data.context, None
    if data.recovery and recipe.recover:
        done, sources = data.recovery, tuple(one.source for one in recipe.recover.text)
        kept = (done.best_step, done.steps) if done.steps else None
        numbers: Any = {"learning_rate": done.learning_rate, "tokens_per_second": done.tokens_per_second}
        training = Recovery(done.loss, done.tokens, done.rank, sources, kept=kept, passages=done.passages, **numbers)
    return Changes(
        data.conversion.method if data.conversion else None,
        longer.method if longer else None,
        len({trial.label for trial in longer.search.trials}) if longer and longer.search else 0,
        training,
    )


def recorded_changes(steps: Sequence[Mapping[str, Any]]) -> Changes:
    """What the steps of a folder changed, as its record has it, which may be of another version."""
    last = {step["step"]: step for step in steps}
    converted, extended, trained = (last.get(name, {}) for name in ("convert", "extend", "recover"))
    longer = extended.get("result") or {}
    return Changes(
        (converted.get("config") or {}).get("method"),
        longer.get("method"),
        len({trial.get("label") for trial in (longer.get("search") or {}).get("trials") or ()}),
        _recorded_training(trained.get("config") or {}, trained.get("result") or {}) if trained else None,
    )


def _recorded_training(config: Mapping[str, Any], found: Mapping[str, Any]) -> Recovery:
    """The card refuses to be without what is not recorded."""
    before, after = found.get("start_passages"), found.get("best_passages")
    rates = [point.get("learning_rate") or 0.0 for point in found.get("history") or ()]
    known: Any = {
        "loss": config.get("loss"),
        "tokens": found.get("tokens"),
        "rank": (config.get("adapter") or {}).get("rank"),
        "sources": tuple(text.get("source") for text in config.get("text") or () if isinstance(text, dict)),
        "kept": (found.get("best_step"), found["steps"]) if found.get("steps") else None,
        "passages": (before, after) if isinstance(before, float) and isinstance(after, float) else None,
    }
    return Recovery(learning_rate=max(rates, default=None), **known)


def title(recipe: Recipe, base_model: str, claimed: int) -> str:
    """A name that says what was done: SmolLM2-135M-Instruct-kv1-w1024-16k."""
    parts = [re.sub(r"\.gguf$", "", base_model.rpartition("/")[2], flags=re.IGNORECASE)]
    if recipe.convert:
        parts.append(f"kv{recipe.convert.kv_heads}")
    if recipe.window:
        parts.append(f"w{recipe.window.size}")
    if recipe.context:
        parts.append(f"{claimed // 1024}k" if claimed >= 1024 else str(claimed))
    return "-".join(parts)
