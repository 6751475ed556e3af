"""What a text source is, whatever it is called: digests of what it holds, and sources that are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from retrofit.checkpoint.provenance import sha256
from retrofit.data.corpora import BUILT_IN, OF_PYTHON, built_in_digest
from retrofit.data.folders import text_files
from retrofit.data.revision import commit_of
from retrofit.data.sources import HUB, OURS, OWN_SAMPLES, SYNTHETIC, hub_dataset, kind_of, place_of
from retrofit.data.synthetic import VERSION
from retrofit.errors import UserError
from retrofit.files import local_path
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import PromptSource


def identity(sources: Sequence[TextSource]) -> list[dict[str, object]]:
    """What the sources hold, for a fingerprint: digests of files and built-in texts, the commit of a hub dataset."""
    return [{**source.model_dump(), "content": _content(source)} for source in sources]


def content_digest(sources: Sequence[TextSource]) -> str:
    """A digest of what the sources hold, whatever they are called."""
    held = [[_content(source), source.field, source.split] for source in merged(sources)]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _content(text: PromptSource) -> object:
    source = text.source
    if source in BUILT_IN:
        return built_in_digest(source)
    if source.startswith(HUB):
        return {"dataset": source, "commit": commit_of(hub_dataset(source)[0])}
    if source == SYNTHETIC:
        return [source, VERSION, *map(built_in_digest, OF_PYTHON)]
    if isinstance(text, TextSource) and source == OWN_SAMPLES:
        prompts = [[prompt.weight, prompt.field, prompt.split, _content(prompt)] for prompt in text.prompts]
        return [source, text.temperature, text.top_p, text.prompt_share, prompts]
    root = local_path(source)
    return {
        file.relative_to(root if root.is_dir() else root.parent).as_posix(): sha256(file) for file in text_files(source)
    }


def require_distinct(sources: Sequence[TextSource], where: str) -> None:
    """UserError when two sources of one section have one name in results: they would be taken for one kind of text."""
    known: dict[str, TextSource] = {}
    for source in sources:
        other = known.setdefault(kind_of(source.source), source)
        if _documents_of(other) != _documents_of(source):
            raise UserError(
                f"`{other.source}` and `{source.source}` are both called `{kind_of(source.source)}`",
                where=where,
                fix="rename one" if other.source != source.source else "keep one of them",
            )


def merged(sources: Sequence[TextSource]) -> tuple[TextSource, ...]:
    """The sources, each with other documents: those that are one under two names are one, with their weights added."""
    found: dict[tuple[object, ...], TextSource] = {}
    for source in sources:
        known = found.get(key := _documents_of(source))
        found[key] = source if known is None else known.model_copy(update={"weight": known.weight + source.weight})
    return tuple(found.values())


def _documents_of(source: TextSource) -> tuple[object, ...]:
    """What two sources with the same documents have in common."""
    if source.source == OWN_SAMPLES:
        return source.source, source.temperature, source.top_p, source.prompts, source.prompt_share
    named = source.source in OURS or source.source.startswith(HUB)
    return source.source if named else place_of(source.source), source.field, source.split
