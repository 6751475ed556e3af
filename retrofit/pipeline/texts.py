"""The text of a run: what identifies it, what calibration reads, and which documents are scored."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.evaluate.score import Document, make_documents
from retrofit.kv_heads.convert import CalibrationText
from retrofit.pipeline.journal import sha256
from retrofit.recipe.schema import Calibration, TextSource
from retrofit.recover.corpora import BUILT_IN
from retrofit.recover.data import OWN_SAMPLES, Teacher, evaluation_texts, training_tokens
from retrofit.recover.files import HUB, kind_of, text_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress


def identity(sources: Sequence[TextSource]) -> list[dict[str, object]]:
    """What the sources hold, for a fingerprint: file digests; the Python version for its own texts; a hub name."""
    return [{**source.model_dump(), "content": _content(source.source)} for source in sources]


def _content(source: str) -> object:
    if source in BUILT_IN:
        return f"Python {platform.python_version()}"
    if source == OWN_SAMPLES or source.startswith(HUB):
        return source
    return {Path(file).name: sha256(Path(file)) for file in text_files(source)}


def calibration_text(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    teacher: Teacher,
    progress: Progress | None = None,
) -> CalibrationText:
    """Packed sequences of every source by its weight, each labelled with its kind."""
    import torch

    total = sum(source.weight for source in calibration.text)
    parts, kinds = [], []
    for index, source in enumerate(calibration.text):
        tokens = max(calibration.sequence_length, round(calibration.tokens * source.weight / total))
        part = training_tokens(
            [source],
            tokenizer,
            tokens,
            calibration.sequence_length,
            seed + index,
            teacher=teacher,
            progress=progress,
        )
        parts.append(part)
        kinds += [kind_of(source.source)] * len(part)
    return CalibrationText(torch.cat(parts), tuple(kinds))


def scored_documents(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    trained_on: Sequence[TextSource] = (),
    teacher: Teacher | None = None,
) -> list[Document]:
    """`count` documents a source, each cut to `length` tokens, none of them trained on.

    Raises UserError when a source has no document of that length.
    """
    texts = evaluation_texts(sources, count, length, tokenizer, trained_on=trained_on, teacher=teacher)
    return make_documents(texts, tokenizer, length=length, count=count)
