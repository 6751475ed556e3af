"""The text of a run: what identifies it, what calibration reads, and which documents are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from retrofit.checkpoint.provenance import FILE, read_provenance, sha256
from retrofit.checkpoint.read import Checkpoint
from retrofit.console import nbytes
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.evaluate.score import Document, make_documents
from retrofit.files import local_path
from retrofit.kv_heads.convert import CalibrationText
from retrofit.model.load import resolve_dtype, working_dtype
from retrofit.recipe.schema import Calibration, Search, TextSource
from retrofit.recover.corpora import BUILT_IN, built_in_digest
from retrofit.recover.data import check_sources, distinct_texts, evaluation_texts, read_texts, require_known
from retrofit.recover.files import HUB, OURS, OWN_SAMPLES, kind_of, place_of
from retrofit.recover.folders import text_files
from retrofit.recover.packing import CHARS_PER_TOKEN, Packed, spelled_tokens, training_rows
from retrofit.recover.samples import Teacher, sample_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress


LONG_SEARCH = 200  # characters per token of the window to look through for a document that is long enough


def identity(sources: Sequence[TextSource]) -> list[dict[str, object]]:
    """What the sources hold, for a fingerprint: digests of files and built-in texts; the name of a hub dataset."""
    return [{**source.model_dump(), "content": _content(source.source)} for source in sources]


def content_digest(sources: Sequence[TextSource]) -> str:
    """A digest of what the sources hold, whatever they are called."""
    held = [[_content(source.source), source.field, source.split] for source in merged(sources)]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _content(source: str) -> object:
    if source in BUILT_IN:
        return built_in_digest(source)
    if source == OWN_SAMPLES or source.startswith(HUB):
        return source
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
    named = source.source in OURS or source.source.startswith(HUB)
    return source.source if named else place_of(source.source), source.field, source.split


def within_window(calibration: Calibration, positions: int) -> tuple[Calibration, tuple[str, ...]]:
    """The calibration in sequences that fit the model's window, and a note where they became shorter."""
    length = calibration.sequence_length
    if length <= positions:
        return calibration, ()
    note = f"calibrated on sequences of {positions:,} tokens instead of {length:,}: the model has no more positions"
    return calibration.model_copy(update={"sequence_length": positions}), (note,)


def calibration_text(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    teacher: Teacher,
    progress: Progress | None = None,
) -> CalibrationText:
    """Packed sequences of every source by its weight, each labelled with its kind.

    No text is read twice: fits are checked on text that they have not seen. The model's own samples are left out,
    with a note, where the model does not fit into memory. Raises UserError for a source with too little text, and for a
    tokenizer that is not the model's.
    """
    import torch

    sources, notes = _within_memory(merged(calibration.text), teacher)
    only, repeated = _distinct(calibration, sources)
    found = list(dict.fromkeys((*notes, *repeated)))
    parts, kinds = [], []
    for index, source in enumerate(sources):
        part = _calibration_rows(calibration, sources, index, tokenizer, seed, teacher, only, progress)
        parts.append(part.ids_NT)
        kinds += [kind_of(source.source)] * len(part.ids_NT)
        found += part.notes
    ids_NT = torch.cat(parts)
    require_known(ids_NT, teacher.folder)
    return CalibrationText(ids_NT, tuple(kinds), tuple(found), content_digest(calibration.text))


def check_calibration(calibration: Calibration) -> tuple[str, ...]:
    """Notes on text that stands in a calibration's text twice; UserError where a source holds nothing else."""
    return _distinct(calibration, merged(calibration.text))[1]


def _distinct(
    calibration: Calibration, sources: Sequence[TextSource]
) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
    """What `distinct_texts` makes of the sources, of as much as is read of each."""

    def chars(source: TextSource) -> int:
        return CHARS_PER_TOKEN * (_tokens_of(calibration, source, sources) + calibration.sequence_length)

    return distinct_texts(sources, limit_chars=chars)


def _tokens_of(calibration: Calibration, source: TextSource, sources: Sequence[TextSource]) -> int:
    share = source.weight / sum(other.weight for other in sources)
    return max(calibration.sequence_length, round(calibration.tokens * share))


def require_calibration_text(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, *, seed: int, teacher: Teacher
) -> None:
    """What `calibration_text` raises, before the model writes samples of its own, which takes minutes."""
    sources, _ = _within_memory(merged(calibration.text), teacher)
    only, _ = _distinct(calibration, sources)
    for index, source in enumerate(sources):
        if source.source != OWN_SAMPLES:
            part = _calibration_rows(calibration, sources, index, tokenizer, seed, teacher, only, None)
            require_known(part.ids_NT, teacher.folder)


def fewest_sequences(calibration: Calibration, teacher: Teacher) -> int:
    """Calibration sequences of the source that gives fewest."""
    sources, _ = _within_memory(merged(calibration.text), teacher)
    return min(-(-_tokens_of(calibration, source, sources) // calibration.sequence_length) for source in sources)


def _calibration_rows(
    calibration: Calibration,
    sources: Sequence[TextSource],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    teacher: Teacher,
    only: Mapping[str, frozenset[str]],
    progress: Progress | None,
) -> Packed:
    """Packed sequences of the source at `index`; only: its documents that are not in another source."""
    return training_rows(
        [sources[index]],
        tokenizer,
        _tokens_of(calibration, sources[index], sources),
        calibration.sequence_length,
        seed + index,
        teacher=teacher,
        repeat=False,
        only=only,
        progress=progress,
    )


def searched_text(
    search: Search,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    seed: int,
    teacher: Teacher,
    progress: Progress | None = None,
) -> tuple[Tensor, str]:
    """(`length` tokens that a search of position encodings reads, BOS included; what they are).

    The beginning of the first document that is long enough, else text packed from several, read again where it does
    not suffice. Nothing held out is read.
    """
    import torch

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for source in search.text:
        limit = LONG_SEARCH * length
        for text in read_texts(source, split="train", teacher=teacher, limit_chars=limit, progress=progress):
            if len(text.text) < length:  # most tokens are several characters
                continue
            ids = bos + tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= length:
                return torch.tensor(ids[:length]), text.name
    name, row = "text packed from several documents, none being long enough", max(16, length // 8)
    try:
        packed = training_rows(search.text, tokenizer, length, row, seed, teacher=teacher, repeat=False)
    except UserError:  # too little, as the other reading announces; whatever else it was, that meets it again
        packed = training_rows(search.text, tokenizer, length, row, seed, teacher=teacher, progress=progress)
        name += "; there was too little, so parts of it stand in it more than once"
    return packed.ids_NT.flatten()[:length], name


def _within_memory(sources: Sequence[TextSource], teacher: Teacher) -> tuple[tuple[TextSource, ...], tuple[str, ...]]:
    """The sources without `self` where the whole model does not fit into this machine's memory, and a note of that."""
    own = [source for source in sources if source.source == OWN_SAMPLES]
    if not own or teacher.device != "cpu" or sample_path(teacher).exists():
        return tuple(sources), ()
    stored, run = (
        resolve_dtype(dtype, teacher.folder).itemsize
        for dtype in ("auto", working_dtype("auto", teacher.folder, teacher.device))
    )
    needed = Checkpoint.open(teacher.folder).nbytes * run // stored
    free = available_memory()
    if free is None or 1.2 * needed <= free:
        return tuple(sources), ()
    others = tuple(source for source in sources if source not in own)
    why = f"the model needs {nbytes(needed)} to write samples, and {nbytes(free)} of memory are free"
    if not others:
        raise UserError(why, where="convert.calibration.text: self", fix="name other text, such as python-docs")
    return others, (f"not calibrated on the model's own samples (`self`): {why}",)


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def read_before(sources: Sequence[TextSource], folder: Path) -> dict[TextSource, str]:
    """Those of `sources` that steps recorded in `folder` calibrated or trained on, each with a note on that."""
    if not (folder / FILE).is_file():
        return {}
    found: dict[TextSource, str] = {}
    for source in sources:
        if source.source in OURS:  # only their held-out side is ever measured
            continue
        steps = [f"`{step['step']}`" for step in _steps(folder) if _reads(step.get("config") or {}, source)]
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


def _steps(folder: Path) -> list[Mapping[str, Any]]:
    return read_provenance(folder).get("steps") or []


def _reads(config: Mapping[str, Any], source: TextSource) -> bool:
    """Whether a recorded step names this source: by where it is, or by its name alone as a published record does."""
    recorded = [text for text in _recorded(config) if text["source"] not in BUILT_IN]
    if source.source.startswith(HUB):
        return any((text["source"], text["split"]) == (source.source, source.split) for text in recorded)
    place = place_of(source.source)
    return any(text["source"] in (source.source, place.name) or _is_at(text["source"], place) for text in recorded)


def recorded_text(folder: Path) -> tuple[TextSource, ...]:
    """Text that steps recorded in `folder` read and that is there to be read again, so that copies of it are known."""
    if not (folder / FILE).is_file():
        return ()
    found: list[TextSource] = []
    for step in _steps(folder):
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
    notes: list[str] | None = None,
) -> list[Document]:
    """`count` documents a source, each cut to `length` tokens, none of them trained on, as `evaluation_texts` has it.

    notes: gets what a person should know of what was left out.
    Raises UserError when a source has no document of that length.
    """
    found: list[str] = []
    texts = evaluation_texts(
        sources,
        count,
        length,
        tokenizer,
        trained_on=trained_on,
        also_read=also_read,
        teacher=teacher,
        read_chars=read_chars,
        notes=found,
    )
    for kind in dict.fromkeys(kind for _, kind, _ in texts):
        found += spelled_tokens(kind, (text for _, own, text in texts if own == kind), tokenizer)
    if notes is not None:
        notes += found
    return make_documents(texts, tokenizer, length=length, count=count)
