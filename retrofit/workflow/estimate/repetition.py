"""How often a training reads each of its texts, estimated from the size of files before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from retrofit.data.corpora import BUILT_IN, built_in_bytes
from retrofit.data.folders import PARQUET, text_files
from retrofit.data.readers import suffix_of
from retrofit.data.sources import HUB, MADE, OWN_SAMPLES, kind_of
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.format import tokens as token_count
from retrofit.recipe.schema import Recover, TextSource
from retrofit.workflow.samples import MOST_SAMPLED

BYTES_PER_TOKEN = 4
MOST_PASSES = 4
"""Repetition beyond it gives little (arXiv 2305.16264)."""


def source_tokens(source: TextSource) -> int | None:
    """About how many tokens a source holds; None for what is not known without reading it, or cannot be read."""
    name = source.source
    if name in BUILT_IN:
        return built_in_bytes(name) // BYTES_PER_TOKEN
    if name in MADE or name.startswith(HUB):
        return None
    try:
        files = text_files(name)
        if any(suffix_of(file) == PARQUET for file in files):  # compressed
            return None
        return -(-sum(Path(file).stat().st_size for file in files) // BYTES_PER_TOKEN)  # 0 for empty files alone
    except (UserError, OSError):
        return None  # reported where texts are checked


def passes(recover: Recover) -> Mapping[str, float]:
    """How often each source is read whole, by name, where it is known; the model's own samples where they are read more
    than once."""
    weights = sum(source.weight for source in recover.text)
    found = {}
    for source in recover.text:
        share = recover.tokens * source.weight / weights
        if source.source == OWN_SAMPLES:
            held: int | None = source.tokens or MOST_SAMPLED
            if share <= (held or 0):
                continue
        else:
            held = source_tokens(source)
        if held:
            found[source.source] = share / held
    return found


def passes_in_words(recover: Recover) -> str:
    """The passes in words: `python-docs 0.3 times`; empty where none is known."""
    return ", ".join(
        f"{shown(kind_of(name), 60)} " + (f"{count:,.1f} times" if count >= 0.1 else "in part")
        for name, count in passes(recover).items()
    )


def require_text(recover: Recover) -> None:
    """UserError for a training that reads a text more than `MOST_PASSES` times, unless it is allowed to."""
    if recover.allow_repeats:
        return
    read = passes(recover)
    worst = max(read, key=lambda name: read[name], default=None)
    if worst is None or read[worst] <= MOST_PASSES:
        return
    most = int(recover.tokens * MOST_PASSES / read[worst])
    raise UserError(
        f"{recover.tokens:,} tokens of training would read `{shown(kind_of(worst), 60)}` about {read[worst]:.0f} times",
        where="recover.text",
        fix=f"name more text (a folder, or hub:DATASET), ask for at most {token_count(most)} tokens, or set "
        "recover.allow_repeats: true",
    )
