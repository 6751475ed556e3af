"""The text of a run: what identifies it, what calibration reads, and which documents are scored."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.provenance import FILE, read_provenance, sha256
from retrofit.checkpoint.read import Checkpoint
from retrofit.console import nbytes
from retrofit.errors import UserError
from retrofit.evaluate.score import Document, make_documents
from retrofit.kv_heads.convert import CalibrationText
from retrofit.model.load import resolve_dtype, working_dtype
from retrofit.recipe.schema import Calibration, Search, TextSource
from retrofit.recover.corpora import BUILT_IN
from retrofit.recover.data import OWN_SAMPLES, evaluation_texts, read_texts, require_known
from retrofit.recover.files import HUB, kind_of, text_files
from retrofit.recover.packing import training_rows
from retrofit.recover.samples import Teacher, sample_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress


LONG_SEARCH = 200  # characters per token of the window to look through for a document that is long enough


def identity(sources: Sequence[TextSource]) -> list[dict[str, object]]:
    """What the sources hold, for a fingerprint: file digests; the Python version for its own texts; a hub name."""
    return [{**source.model_dump(), "content": _content(source.source)} for source in sources]


def _content(source: str) -> object:
    if source in BUILT_IN:
        return f"Python {platform.python_version()}"
    if source == OWN_SAMPLES or source.startswith(HUB):
        return source
    root = Path(source).expanduser()
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
    named = source.source in (*BUILT_IN, OWN_SAMPLES) or source.source.startswith(HUB)
    return source.source if named else Path(source.source).expanduser().resolve(), source.field, source.split


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
    total = sum(source.weight for source in sources)
    parts, kinds = [], []
    for index, source in enumerate(sources):
        tokens = max(calibration.sequence_length, round(calibration.tokens * source.weight / total))
        part = training_rows(
            [source],
            tokenizer,
            tokens,
            calibration.sequence_length,
            seed + index,
            teacher=teacher,
            repeat=False,
            progress=progress,
        ).ids_NT
        parts.append(part)
        kinds += [kind_of(source.source)] * len(part)
    ids_NT = torch.cat(parts)
    require_known(ids_NT, teacher.folder)
    return CalibrationText(ids_NT, tuple(kinds), notes)


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
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def read_before(sources: Sequence[TextSource], folder: Path) -> dict[TextSource, str]:
    """Those of `sources` that steps recorded in `folder` calibrated or trained on, each with a note on that."""
    if not (folder / FILE).is_file():
        return {}
    found: dict[TextSource, str] = {}
    for source in sources:
        if source.source in (*BUILT_IN, OWN_SAMPLES):  # only their held-out side is ever measured
            continue
        steps = [f"`{step['step']}`" for step in read_provenance(folder)["steps"] if _reads(step["config"], source)]
        if steps:
            by = " and ".join(dict.fromkeys(steps))
            found[source] = f"`{source.source}` was read by {by} of this model: only its held-out part is measured"
    return found


def _reads(config: Mapping[str, Any], source: TextSource) -> bool:
    """Whether a recorded step names this source: by where it is, or by its name alone as a published record does."""
    sections = (config, config.get("calibration") or {}, config.get("search") or {})
    recorded = [text for section in sections for text in section.get("text", ()) if text["source"] not in BUILT_IN]
    if source.source.startswith(HUB):
        return any((text["source"], text["split"]) == (source.source, source.split) for text in recorded)
    place = Path(source.source).expanduser().resolve()
    return any(
        text["source"] in (source.source, place.name) or Path(text["source"]).expanduser().resolve() == place
        for text in recorded
    )


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
