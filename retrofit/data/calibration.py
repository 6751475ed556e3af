"""The text of a calibration: token ids by kind, in batches and folds, packed from every source by its weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.data.packing import CHARS_PER_TOKEN, Packed, training_rows
from retrofit.data.samples import OwnSamples, Teacher
from retrofit.data.sources import OWN_SAMPLES, kind_of
from retrofit.data.texts import distinct_texts, require_known
from retrofit.errors import UserError
from retrofit.format import nbytes
from retrofit.recipe.schema import Calibration, TextSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress


from retrofit.data.identity import content_digest, merged
from retrofit.system.memory import available_memory

TOKENS_PER_BATCH = 8192
AVERAGED_TOKENS = 8192  # tokens whose attention patterns average the values, by default


@dataclass(frozen=True)
class CalibrationText:
    """Token ids [N, T] and the kind of text of each of the N sequences. notes: what was not done as asked, and why.
    content: digest of the sources that it was taken from."""

    input_ids_NT: Tensor
    kinds: tuple[str, ...]
    notes: tuple[str, ...] = ()
    content: str | None = None

    def __post_init__(self) -> None:
        assert len(self.kinds) == self.input_ids_NT.shape[0]

    @property
    def tokens_by_kind(self) -> dict[str, int]:
        """Tokens of each kind of text."""
        length = self.input_ids_NT.shape[1]
        return {kind: self.kinds.count(kind) * length for kind in dict.fromkeys(self.kinds)}

    def batches(self, tokens: int = TOKENS_PER_BATCH) -> list[tuple[str, Tensor]]:
        """(kind, ids [B, T]) of one kind each, at most `tokens` tokens and half of the kind's sequences."""
        out = []
        for kind in dict.fromkeys(self.kinds):
            rows = [i for i, k in enumerate(self.kinds) if k == kind]
            size = max(1, min(tokens // self.input_ids_NT.shape[1], len(rows) // 2))
            out += [(kind, self.input_ids_NT[rows[i : i + size]]) for i in range(0, len(rows), size)]
        return out

    def folds(self, tokens: int = TOKENS_PER_BATCH) -> tuple[tuple[str, int], ...]:
        """(kind, part) of each of `batches`.

        Repairs are checked on parts of each kind, and on kinds, that a trial fit does not see.
        """
        seen: dict[str, int] = {}
        found = []
        for kind, _ in self.batches(tokens):
            found.append((kind, seen.get(kind, 0) % 2))
            seen[kind] = seen.get(kind, 0) + 1
        return tuple(found)

    def digest(self) -> str:
        """sha256 of ids and kinds."""
        ids = self.input_ids_NT.to(torch.int64).contiguous()
        found = hashlib.sha256(json.dumps([list(ids.shape), self.kinds]).encode())
        found.update(ids.numpy().data)
        return found.hexdigest()


def within_positions(calibration: Calibration, positions: int) -> tuple[Calibration, tuple[str, ...]]:
    """The calibration in sequences that the model has positions for, and a note where they became shorter."""
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
    one_document: bool = False,
    progress: Progress | None = None,
) -> CalibrationText:
    """Packed sequences of every source by its weight, each labelled with its kind. one_document: each is a piece of one
    document where one is long enough.

    No text is read twice: fits are checked on text that they have not seen. The model's own samples are left out,
    with a note, where the model does not fit into memory. Raises UserError for a source with too little text, and for a
    tokenizer that is not the model's.
    """
    sources, notes = _within_memory(merged(calibration.text), teacher)
    only, repeated = _distinct(calibration, sources)
    found = list(dict.fromkeys((*notes, *repeated)))
    parts, kinds = [], []
    for index, source in enumerate(sources):
        part = _calibration_rows(
            calibration, sources, index, tokenizer, seed, teacher, only, progress, one_document=one_document
        )
        parts.append(part.ids_NT)
        kinds += [kind_of(source.source)] * len(part.ids_NT)
        found += part.notes
    ids_NT = torch.cat(parts)
    require_known(ids_NT, teacher.model)
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
            require_known(part.ids_NT, teacher.model)


def sampled_sources(calibration: Calibration, teacher: Teacher) -> tuple[TextSource, ...]:
    """The sources of a calibration that the model is to write."""
    sources, _ = _within_memory(merged(calibration.text), teacher)
    return tuple(source for source in sources if source.source == OWN_SAMPLES)


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
    *,
    one_document: bool = False,
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
        one_document=one_document,
        progress=progress,
    )


def _within_memory(sources: Sequence[TextSource], teacher: Teacher) -> tuple[tuple[TextSource, ...], tuple[str, ...]]:
    """The sources without `self` where the whole model does not fit into this machine's memory, and a note of that."""
    own = [source for source in sources if source.source == OWN_SAMPLES]
    if not own or teacher.device != "cpu":
        return tuple(sources), ()
    written = OwnSamples(teacher, own[0], "train")
    if written.complete:
        return tuple(sources), ()
    stored, run = (teacher.model.dtype(dtype).itemsize for dtype in ("auto", teacher.dtype))
    needed = teacher.model.checkpoint.nbytes * run // stored
    needed += written.batch * teacher.model.spec.kv_cache_bytes(teacher.length, run)
    free = available_memory()
    if free is None or 1.2 * needed <= free:
        return tuple(sources), ()
    others = tuple(source for source in sources if source not in own)
    why = f"the model needs {nbytes(needed)} to write samples, and {nbytes(free)} of memory are free"
    if not others:
        raise UserError(why, where="convert.calibration.text: self", fix="name other text, such as python-docs")
    return others, (f"not calibrated on the model's own samples (`self`): {why}",)
