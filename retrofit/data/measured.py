"""The documents that are measured, and what earlier steps of a model have read of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from retrofit.checkpoint.provenance import FILE, read_provenance
from retrofit.data.chat_documents import chat_documents
from retrofit.data.corpora import BUILT_IN
from retrofit.data.documents import Document, make_documents
from retrofit.data.packing import spelled_tokens
from retrofit.data.samples import Teacher
from retrofit.data.sources import HUB, OURS, holds_dialogues, place_of
from retrofit.data.texts import check_sources, evaluation_texts
from retrofit.data.unseen import Findings
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import local_path
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import LossOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_before(sources: Sequence[TextSource], folder: Path) -> dict[TextSource, str]:
    """Those of `sources` that steps recorded in `folder` calibrated or trained on, each with a note on that."""
    found: dict[TextSource, str] = {}
    for source in sources:
        if source.source in OURS:  # only their held-out side is ever measured
            continue
        steps = [f"`{step['step']}`" for step in recorded_steps(folder) if _reads(step.get("config") or {}, source)]
        if steps:
            by = " and ".join(dict.fromkeys(steps))
            name = source.source if source.source.startswith(HUB) else Path(source.source).name
            found[source] = f"`{name}` was read by {by} of this model: only its held-out part is measured"
    return found


def _is_at(name: str, place: Path) -> bool:
    try:
        return local_path(name).resolve() == place
    except UserError:  # no name of this machine's files
        return False


def recorded_steps(folder: Path) -> list[Mapping[str, Any]]:
    """The steps that made a checkpoint, as its record has them; none where it has no record."""
    return (read_provenance(folder).get("steps") or []) if (folder / FILE).is_file() else []


def _reads(config: Mapping[str, Any], source: TextSource) -> bool:
    """Whether a recorded step names this source: by where it is, or by its name alone as a published record does."""
    recorded = [text for text in _recorded(config) if text["source"] not in BUILT_IN]
    if source.source.startswith(HUB):
        return any((text["source"], text["split"]) == (source.source, source.split) for text in recorded)
    place = place_of(source.source)
    return any(text["source"] in (source.source, place.name) or _is_at(text["source"], place) for text in recorded)


def recorded_text(folder: Path) -> tuple[TextSource, ...]:
    """Text that steps recorded in `folder` read and that is there to be read again, so that copies of it are known."""
    found: list[TextSource] = []
    for step in recorded_steps(folder):
        for text in _recorded(step.get("config") or {}):
            source = TextSource.model_validate(text)
            if source.source in BUILT_IN or _readable(source):
                found.append(source)
    return tuple(dict.fromkeys(found))


def _readable(source: TextSource) -> bool:
    if source.source in OURS or source.source.startswith(HUB):
        return False
    try:
        check_sources([source])
    except UserError:  # another file of that name, or none: a record of another machine
        return False
    return True


def _recorded(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The text sources of a recorded step, of all its sections."""
    sections = (config, config.get("calibration") or {}, config.get("search") or {})
    texts = [section.get("text") or () for section in sections if isinstance(section, Mapping)]
    found = [text for listed in texts for text in (listed if isinstance(listed, list | tuple) else (listed,))]
    for text in found:
        try:
            TextSource.model_validate(text)
        except ValidationError as error:
            raise UserError(
                f"{FILE} records a text that is none: {shown(text, 60)}",
                where=FILE,
                fix="remove the file, and the folder is read as anybody's checkpoint",
            ) from error
    return found


def scored_documents(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    trained_on: Sequence[TextSource] = (),
    also_read: Sequence[TextSource] = (),
    teacher: Teacher | None = None,
    read_chars: int | None = None,
    lengths: Sequence[int] = (),
    loss_on: LossOn = "assistant",
    findings: Findings | None = None,
) -> list[Document]:
    """`count` documents a source, each cut to `length` tokens, none of them trained on, as `evaluation_texts` has it;
    of a source of dialogues as many as have about as many tokens (`chat_documents`), after the texts.

    lengths: of the contexts that are asked for, by default `length`. loss_on: the tokens of dialogues that are scored.
    findings: gets what was found of copies that were left out.
    Raises UserError when a source has no document of that length.
    """
    found = findings or Findings()
    spoken = [source for source in sources if holds_dialogues(source)]
    texts = evaluation_texts(
        [source for source in sources if source not in spoken],
        count,
        length,
        tokenizer,
        trained_on=trained_on,
        also_read=also_read,
        teacher=teacher,
        read_chars=read_chars,
        findings=found,
    )
    for kind in dict.fromkeys(kind for _, kind, _ in texts):
        found.notes += spelled_tokens(kind, (text for _, own, text in texts if own == kind), tokenizer)
    dialogues = []
    if spoken:
        lengths = lengths or [length]
        dialogues = chat_documents(
            spoken,
            tokenizer,
            tokens=count * max(lengths),
            lengths=lengths,
            loss_on=loss_on,
            trained_on=trained_on,
            also_read=also_read,
            read_chars=read_chars,
            findings=found,
        )
    documents = make_documents(texts, tokenizer, length=length, count=count) if texts or not spoken else []
    return [*documents, *dialogues]
