"""The work of each step, from checkpoint folder to checkpoint folder, shared by a recipe's steps and single commands.

Every folder is written staged, holds a `retrofit.json` that says where it comes from, and loads in stock transformers.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import read_config
from retrofit.checkpoint.extensions import held_scale
from retrofit.checkpoint.provenance import digest, versions, write_provenance
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.staging import staged
from retrofit.checkpoint.write import write_config
from retrofit.console import jsonable
from retrofit.context.rope import extend as extended
from retrofit.context.rope import portable, write_extended
from retrofit.context.search.halving import Found, search
from retrofit.data.calibration import calibration_text
from retrofit.data.documents import Document, tokenizer_digest
from retrofit.data.identity import merged
from retrofit.data.samples import Teacher
from retrofit.data.search_text import searched_text
from retrofit.data.texts import require_known
from retrofit.evaluation.continuations import continuations
from retrofit.evaluation.long_context import Measured, longest_prompt, measure, native_length
from retrofit.evaluation.scoring.reader import require_positions
from retrofit.evaluation.scoring.score import TokenLosses, score
from retrofit.kernels.registry import Choice, Proof, apply, choose, prove
from retrofit.kv_heads.convert import ConvertReport
from retrofit.kv_heads.convert import convert as convert_heads
from retrofit.kv_heads.disk import require_room
from retrofit.kv_heads.room import held, room_needed
from retrofit.model.families import describe
from retrofit.model.load import load_config, load_model, load_tokenizer, resolve_dtype, working_dtype
from retrofit.recipe.schema import Context, Convert, Evaluate, Recover
from retrofit.recovery.schedule import recovery_rows
from retrofit.recovery.train import RecoverReport
from retrofit.recovery.train import recover as train
from retrofit.workflow.plan import COST_ROUNDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.evaluation.cost import RunCost
    from retrofit.model.reexpress import ReexpressReport

PROOF_TOKENS = 256
_OF_THE_MOMENT = ("seconds", "peak_bytes", "tokens_per_second", "resumed_from", "notes")


@dataclass(frozen=True)
class Origin:
    """What a written folder records about itself. source: of the original model; steps: those before this one.

    question: digest of everything that a command of one step was asked; None in a run, whose journal knows that, and
    which files it wrote.
    """

    source: Mapping[str, object]
    steps: tuple[Mapping[str, object], ...] = ()
    question: str | None = None

    def after(self, step: str, config: object, result: Mapping[str, object]) -> Origin:
        """The same with one more step."""
        record = {"step": step, "config": config, "result": _timeless(result)}
        return replace(self, steps=(*self.steps, record))

    def write(self, folder: Path) -> None:
        """Write retrofit.json into the folder, which is whole but for that."""
        own = self.question is not None
        asked = {"question": self.question, "files": digest(folder, everything=True)} if own else {}
        write_provenance(folder, {"source": self.source, "steps": self.steps, "versions": versions(), **asked})


def convert(
    source: Path,
    out: Path,
    convert: Convert,
    origin: Origin,
    *,
    teacher: Teacher,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    work: Path,
    moments: Path | None = None,
    context: Context | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write `source` with fewer KV heads to `out`.

    work: where conversion keeps what it can go on from, on the disk of `out`. moments: where to keep every layer's.
    context: what the run does to the window next; what a search will find is not known yet.
    """
    config, text, read_with = load_config(source), None, None
    spec, calibration = describe(config), convert.calibration
    if context and not context.searches:
        method, settings = str(context.method), context.settings
        read_with = extended(config, length=context.length, factor=context.factor, method=method, settings=settings)
    if convert.calibrates and convert.kv_heads != spec.layers[0].kv_heads:
        needed = room_needed(
            spec,
            convert.kv_heads,
            calibration.tokens + len(calibration.text) * calibration.sequence_length,  # sequences are whole
            repairs=convert.repair != "none",
            moments=moments is not None,
            value_bytes=resolve_dtype(dtype, source).itemsize,
            checkpoint_bytes=Checkpoint.open(source).nbytes,
        )
        require_room(work, needed - held(work))  # before the model writes its samples, which takes minutes
        tokenizer = load_tokenizer(source)
        text = calibration_text(calibration, tokenizer, seed=seed, teacher=teacher, progress=progress)
    with staged(out, overwrite=overwrite, keep=work / "checkpoint") as folder:
        report = convert_heads(
            source,
            folder,
            kv_heads=convert.kv_heads,
            method=convert.method,
            repair=convert.repair,
            text=text,
            averaged_tokens=convert.calibration.averaged_tokens,
            device=device,
            dtype=None if dtype == "auto" else resolve_dtype(dtype, source),
            max_shard_size=max_shard_size,
            work=work,
            moments=moments,
            read_with=read_with,
            progress=progress,
        )
        write_config(folder, portable(read_config(folder)))
        origin.after("convert", dump(convert), facts(report)).write(folder)
    for note in report.notes if progress else ():
        progress.note(note)  # type: ignore[union-attr]
    return report


def reexpress(
    source: Path,
    out: Path,
    origin: Origin,
    *,
    target: str | None,
    dtype: str,
    work: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReexpressReport:
    """Write `source` as another architecture, the same function, to `out`.

    work: where the shards are kept that it can go on from, on the disk of `out`.
    """
    from retrofit.model.reexpress import reexpress as write_reexpressed

    with staged(out, overwrite=overwrite, keep=work / "checkpoint") as folder:
        report = write_reexpressed(source, folder, target=target, dtype=dtype, resume=True, progress=progress)
        write_config(folder, portable(read_config(folder)))
        config = {"target": report.target, "dtype": report.dtype}
        origin.after("reexpress", config, facts(report)).write(folder)
    return report


def extend(
    source: Path,
    out: Path,
    context: Context,
    origin: Origin,
    *,
    teacher: Teacher,
    kernel: str,
    device: str,
    seed: int,
    work: Path,
    link: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `source` with a longer window to `out`. link: unchanged weights are hard links where the disk allows them.

    Returns the facts of the extension, and under `search` how its encoding was found. teacher: the original model, for
    the text source `self`. work: where a search keeps what it can go on from.
    """
    found = None
    method, settings = str(context.method), context.settings
    # The record of a run's own folders begins at the run's original, which may have been extended before.
    held = math.prod(held_scale(folder) for folder in {source, teacher.folder})
    if context.searches:
        found = _search(
            source,
            context,
            teacher=teacher,
            kernel=kernel,
            device=device,
            seed=seed,
            held=held,
            work=work,
            progress=progress,
        )
        method, settings = found.method, found.settings
    with staged(out, overwrite=overwrite) as folder:
        extension = write_extended(
            source,
            folder,
            length=context.length,
            factor=context.factor,
            method=method,
            settings=settings,
            held=held,
            link=link,
        )
        result = {**facts(extension), **({"search": facts(found)} if found else {})}
        origin.after("extend", dump(context), result).write(folder)
    return result


def _search(
    source: Path,
    context: Context,
    *,
    teacher: Teacher,
    kernel: str,
    device: str,
    seed: int,
    held: float,
    work: Path,
    progress: Progress | None,
) -> Found:
    section = context.searches
    assert section
    model = load_model(source, dtype=working_dtype("auto", source, device), device=device)
    tokenizer = load_tokenizer(source)
    length = context.target(model.config.get_text_config().max_position_embeddings)
    ids_T, name = searched_text(section, tokenizer, length, seed=seed, teacher=teacher, progress=progress)
    if progress:
        progress.note(f"search: position encodings for {length:,} tokens, measured on {name}")
    choice = kernel_for(model, kernel, device)
    found = search(
        model,
        tokenizer,
        ids_T,
        section=section,
        name=name,
        seed=seed,
        held=held,
        kernel=None if choice.requested == "auto" else choice,
        identity=digest(source),
        partial=work,
        progress=progress,
    )
    if progress:
        won, reference = found.winner, found.reference
        progress.note(
            f"search: {won.label}, objective {won.objective:.3f}; {reference.label}: {reference.objective:.3f}"
        )
    del model
    gc.collect()
    return found


def recover(
    student: Path,
    original: Path,
    out: Path,
    section: Recover,
    origin: Origin,
    *,
    samples: Teacher,
    kernel: str,
    device: str,
    seed: int,
    work: Path,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RecoverReport:
    """Train `student` to follow `original` and write the merged checkpoint to `out`.

    samples: the original model, for the text source `self`. work: where training keeps what it can go on from.
    """
    tokenizer = load_tokenizer(student)
    read = section.model_copy(update={"text": merged(section.text)})
    rows, held_out = recovery_rows(read, tokenizer, seed, teacher=samples, progress=progress)
    require_known(rows.ids_NT, student)
    with staged(out, overwrite=overwrite) as folder:
        report = train(
            student,
            original,
            folder,
            section,
            rows,
            held_out,
            device=device,
            kernel=kernel,
            seed=seed,
            work_dir=work,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        origin.after("recover", dump(section), facts(report)).write(folder)
    return report


def score_folder(
    folder: Path,
    documents: Sequence[Document],
    evaluate: Evaluate,
    *,
    label: str,
    kernel: str,
    device: str,
    native: int | None = None,
    seed: int = 0,
    continuation_tokens: int = 0,
    identity: Mapping[str, str] | None = None,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> tuple[TokenLosses, dict[str, str], Measured]:
    """Token losses of a checkpoint folder, the {"kernel", "reason"} it was read with, and what else was asked for.

    native: the length the original was made for; by default what the folder records. continuation_tokens: to write
    after a few prompts. identity: digests of the checkpoint, recorded with the losses. partial: where finished
    documents are kept until all are.

    Raises UserError, before anything is read, where learned positions end before the longest length.
    """
    require_positions(load_config(folder), longest_prompt(evaluate), str(folder))
    model, tokenizer, choice = ready(folder, evaluate, kernel, device)
    if progress:
        progress.note(f"{label}: kernel {choice.name}, {choice.reason}")
        if tokenizer.bos_token_id is None:
            progress.note("this tokenizer has no BOS: the first token of every document is given, not predicted")
    meta: dict[str, object] = {"model": label, "tokenizer_sha256": tokenizer_digest(tokenizer)}
    if identity:
        meta["checkpoint"] = dict(identity)
    asked = None if choice.requested == "auto" else choice
    kept = partial / "full" if partial else None
    longest = max(evaluate.lengths)  # only moving windows read what lies beyond
    losses = score(
        model,
        [document.cut(longest) for document in documents],
        lengths=evaluate.lengths,
        chunk=evaluate.chunk,
        kernel=asked,
        meta=meta,
        partial=kept,
        progress=progress,
    )
    if native is None:
        native = native_length(model.config)
    measured = measure(
        model,
        tokenizer,
        documents,
        losses,
        evaluate,
        native,
        kernel=asked,
        seed=seed,
        partial=partial,
        progress=progress,
    )
    written = continuations(model, tokenizer, documents, tokens=continuation_tokens, kernel=asked)
    del model
    gc.collect()
    return losses, {"kernel": choice.name, "reason": choice.reason}, replace(measured, continuations=written)


def ready(
    folder: Path, evaluate: Evaluate, kernel: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Choice]:
    """The model of a checkpoint folder as it is evaluated, its tokenizer, and the kernel it has."""
    model = load_model(folder, dtype=working_dtype(evaluate.dtype, folder, device), device=device)
    choice = kernel_for(model, kernel, device)
    apply(model, choice)
    return model, load_tokenizer(folder), choice


def run_costs(
    folders: Mapping[str, Path], evaluate: Evaluate, *, kernel: str, device: str, seed: int
) -> Mapping[str, RunCost | None]:
    """What the first and the last checkpoint folder cost to run, measured in turn; None for those between them, and
    where the recipe asks for no lengths."""
    if not evaluate.cost_lengths:
        return dict.fromkeys(folders)
    from retrofit.evaluation.cost import side_by_side

    def load(folder: Path) -> PreTrainedModel:
        return ready(folder, evaluate, kernel, device)[0]

    compared = [label for i, label in enumerate(folders) if i in (0, len(folders) - 1)]
    models = {label: functools.partial(load, folders[label]) for label in compared}
    rounds = COST_ROUNDS if len(models) > 1 else 1
    found = side_by_side(models, evaluate.cost_lengths, evaluate.decode_tokens, rounds=rounds, seed=seed)
    return {label: found.get(label) for label in folders}


def prove_kernel(folder: Path, document: Document, *, kernel: str, device: str) -> Proof:
    """Compare the kernel's logits with eager's on a short text: in float32 on a CPU, where rounding hides nothing."""
    import torch

    model = load_model(folder, dtype="float32" if device == "cpu" else "auto", device=device)
    ids = torch.from_numpy(document.input_ids[:PROOF_TOKENS])[None].to(device)
    return prove(model, kernel_for(model, kernel, device), ids)


def kernel_for(model: PreTrainedModel, kernel: str, device: str) -> Choice:
    """The kernel that `kernel` becomes for a loaded model."""
    return choose(kernel, describe(model.config), device, dtype=str(model.dtype).removeprefix("torch."))


def kv_bytes(folder: Path, lengths: Sequence[int]) -> tuple[int, dict[str, int], int]:
    """(bytes per token, bytes by number of tokens, KV heads) of the cache of a checkpoint folder, in its own dtype."""
    spec = describe(load_config(folder))
    size = resolve_dtype("auto", folder).itemsize
    by_length = {str(length): spec.kv_cache_bytes(length, size) for length in lengths}
    return spec.kv_bytes_per_token(size), by_length, spec.layers[0].kv_heads


def facts(report: object) -> dict[str, Any]:
    """A report as JSON values."""
    found = jsonable(report)
    assert isinstance(found, dict)
    return found


def _timeless(value: Any) -> Any:
    """Without clock, memory and interruptions, so that the same inputs give the same bytes."""
    if isinstance(value, Mapping):
        return {key: _timeless(item) for key, item in value.items() if key not in _OF_THE_MOMENT}
    return [_timeless(item) for item in value] if isinstance(value, list | tuple) else value


def dump(section: Convert | Context | Recover) -> dict[str, Any]:
    """A section of a recipe as JSON values, without what its method does not read."""
    unused = {"calibration", "repair"} if isinstance(section, Convert) and not section.calibrates else set()
    if isinstance(section, Context):
        unused = {name for name, value in section.model_dump().items() if value is None}
        section = section.model_copy(update={"search": section.searches})
        unused -= {"search"} if section.search else set()
    return section.model_dump(mode="json", exclude=unused)
