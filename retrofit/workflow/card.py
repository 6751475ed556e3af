"""From a run to what its model card is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


def card_input(
    context: ModelContext,
    artifact: Artifact,
    folder: Path,
    section: Publish,
    data: RunData,
    allowed: Tolerance,
    *,
    chart: str | None,
) -> CardInput:
    """What the card of `folder`, a copy of `artifact`, says. allowed: of the proof in a fresh process. chart: a file of
    the folder."""
    recipe, source = context.recipe, context.source
    config, before, after = artifact.model.config, context.spec, artifact.model.spec
    first, extension = data.models[0], data.context or {}
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
        conversion=recipe.convert.method if recipe.convert else (data.conversion or {}).get("method"),
        windows=_windows(data),
        context_method=extension.get("method"),
        encodings_tried=len({trial["label"] for trial in (extension.get("search") or {}).get("trials", ())}),
        effective=data.models[-1].effective,
        recovery=_recovery(recipe, data.recovery),
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


def _recovery(recipe: Recipe, done: Mapping[str, Any] | None) -> Recovery | None:
    if done is None:
        return None
    sources = done.get("sources") or [one.source for one in (recipe.recover.text if recipe.recover else ())]
    numbers = {name: done[name] for name in ("loss", "tokens", "rank", "learning_rate", "tokens_per_second")}
    kept = (done["best_step"], done["steps"]) if done.get("steps") else None
    before, after = done.get("passages") or (None, None)
    passages = (float(before), float(after)) if isinstance(before, float) and isinstance(after, float) else None
    return Recovery(sources=tuple(sources), kept=kept, passages=passages, **numbers)


def title(recipe: Recipe, base_model: str, claimed: int) -> str:
    """A name that says what was done: SmolLM2-135M-Instruct-kv1-16k."""
    parts = [re.sub(r"\.gguf$", "", base_model.rpartition("/")[2], flags=re.IGNORECASE)]
    if recipe.convert:
        parts.append(f"kv{recipe.convert.kv_heads}")
    if recipe.context:
        parts.append(f"{claimed // 1024}k" if claimed >= 1024 else str(claimed))
    return "-".join(parts)
