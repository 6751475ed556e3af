"""Recovery: a short adapter training that brings a changed model back to the original, and the merge afterwards.

The loop is transformers' Trainer (optimizer, schedule, clipping, checkpoints, launchers); the loss is ours.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from retrofit.context.positions import require_hidden, require_visible
from retrofit.data.packing import Packed
from retrofit.errors import UserError
from retrofit.model.folder import ModelFolder, opened
from retrofit.recipe.schema import Recover
from retrofit.recovery.adapters import about_experts, attach, default_rate, merge_and_save, save_adapter
from retrofit.recovery.callbacks import TrainPoint, TrainState, Watch, last_checkpoint, restore, trainable
from retrofit.recovery.schedule import Rows, TrainRows, about, check_lengths, collate, held_out_lines, training_lines
from retrofit.recovery.student_teacher import StudentTeacher, body, compute_dtype, hidden_states, load_student_teacher
from retrofit.recovery.trainer import HeldOut, Objective, RecoveryTrainer, autocast, trial_step
from retrofit.system.device import micro_batch, steps_between_readings

if TYPE_CHECKING:
    from peft import PeftModel

    from retrofit.console import Progress

LOGGED = 200  # lines that a training logs where it reports, about
TENSORBOARD = "TENSORBOARD_LOGGING_DIR"  # where transformers reads TensorBoard's folder


@dataclass(frozen=True)
class RecoverReport:
    """What a recovery did. Losses are nats per token, of the objective trained on (KL for distill).

    history: the start (step 0) and every step. best_step: whose weights were kept, 0 for the start. seconds and
    peak_bytes: wall time over all sessions, and the largest memory of this process (of the GPU on CUDA).
    """

    history: tuple[TrainPoint, ...]
    steps: int
    tokens: int
    best_step: int
    start_loss: float | None
    best_loss: float | None
    seconds: float
    peak_bytes: int
    trained_parameters: int
    kernel: str
    compute_dtype: str
    shared_bytes: int
    resumed_from: int
    notes: tuple[str, ...]


def recover(
    student_folder: str | Path | ModelFolder,
    teacher_folder: str | Path | ModelFolder | None,
    out: str | Path,
    recipe: Recover,
    tokens: Packed,
    held_out: Packed | None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    kernel: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    work_dir: str | Path,
    max_shard_size: str = "5GB",
    adapter: Path | None = None,
    logs: Path | None = None,
) -> RecoverReport:
    """Train adapters on the student and write the merged checkpoint into the existing (staged) folder `out`.

    tokens, held_out: packed rows from `recovery_rows`; without held_out the last weights are kept.
    teacher_folder: the original model (needed for loss: distill). dtype: what is computed in; the checkpoint keeps the
    student's. work_dir: trainer checkpoints; a run that was killed resumes from its last one and ends with the same
    bytes (on the same machine). adapter: an existing folder for the adapter as peft reads it. logs: TensorBoard's
    folder, where `recipe.report_to` names it; without one TENSORBOARD_LOGGING_DIR or work_dir.

    Raises UserError when the loss is not finite, saying at which step, what `load_student_teacher` and `check_lengths`
    raise, and, before the first step, when the kernel does not see across skipped positions or sees across documents.
    """
    notes: list[str] = []
    work_dir = Path(work_dir)
    student = opened(student_folder)
    if recipe.loss == "distill" and teacher_folder is None:
        raise UserError("distillation needs the original model", where="recover.loss", fix="name it, or use loss: lm")
    compute = compute_dtype(device, dtype)
    teacher = opened(teacher_folder) if recipe.loss == "distill" and teacher_folder is not None else None
    spec = student.spec
    window = spec.max_position_embeddings
    if recipe.learning_rate is None:
        recipe = recipe.model_copy(update={"learning_rate": default_rate(spec.hidden_size)})
        _note(notes, progress, f"learning rate {recipe.learning_rate:.2g}, for a width of {spec.hidden_size}")
    native = window if teacher is None else teacher.spec.max_position_embeddings
    check_lengths(recipe, native, window)
    documents = recipe.document_masking
    pair = load_student_teacher(student, teacher, device=device, dtype=compute, kernel=kernel, documents=documents)
    _note(
        notes, progress, f"training in {str(compute).removeprefix('torch.')} with {pair.kernel}: {pair.kernel_reason}"
    )
    for text in tokens.notes:
        _note(notes, progress, text)
    lines = training_lines(tokens, recipe, window, seed)
    measured = None if held_out is None else held_out_lines(held_out, recipe, window, seed)
    model = student_with_adapters(pair, recipe, seed)
    _check_sight(model, lines, recipe, compute, device)
    for text in (*about(recipe, window, pair.spec), *about_experts(recipe.adapter, pair.spec)):
        _note(notes, progress, text)
    objective = Objective(pair, recipe)
    fingerprint = _fingerprint(student, teacher, recipe, lines, measured, seed, compute, pair.kernel)
    checkpoint = last_checkpoint(work_dir, fingerprint)
    course = TrainState(fingerprint) if checkpoint is None else TrainState.load(checkpoint)
    resumed_from = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    attempt = partial(trial_step, objective, model, Rows(lines), compute, device)
    micro = micro_batch(recipe.batch_size, attempt, device)
    if micro < recipe.batch_size:
        _note(notes, progress, f"{micro} of the {recipe.batch_size} rows of a step fit into the GPU at a time")
    arguments = _arguments(recipe, work_dir, len(lines.ids_NT), device, seed, micro)
    steps = arguments.max_steps
    watch = Watch(
        course,
        weights=lambda: trainable(model),
        held_out_loss=None if measured is None else HeldOut(objective, model, Rows(measured), compute, device),
        evaluate_at=frozenset(round(steps * (i + 1) / recipe.evals) for i in range(recipe.evals)) | {steps},
        tokens_per_step=recipe.batch_size * lines.ids_NT.shape[1],
        progress=progress,
        read_every=steps_between_readings(device),
    )
    if held_out is None:
        _note(notes, progress, "nothing is held out, so the last weights are kept, not the best")
    if resumed_from:
        _note(notes, progress, f"resuming from step {resumed_from} of {steps}")
    if progress is not None:
        progress.start("recover", steps * watch.tokens_per_step, "tokens")
        progress.advance(resumed_from * watch.tokens_per_step)
    if resumed_from < steps:
        with _tensorboard_folder(logs):
            trainer = RecoveryTrainer(
                objective=objective,
                compute=compute,
                watch=watch,
                model=model,
                args=arguments,
                train_dataset=Rows(lines),
                data_collator=collate,
                callbacks=[watch],
            )
        trainer.remove_callback(PrinterCallback)
        watch.log = trainer.log if recipe.report_to else None
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if progress is not None:
        progress.finish()
    restore(model, course.best)
    if course.best_step == 0 and held_out is not None:
        _note(notes, progress, "no measurement was better than the start; the weights are kept as they were")
    if adapter is not None:
        save_adapter(model, adapter)
    merge_and_save(model, student, out, max_shard_size=max_shard_size, progress=progress)
    return RecoverReport(
        history=tuple(course.history),
        steps=steps,
        tokens=lines.ids_NT.numel(),
        best_step=course.best_step,
        start_loss=course.start_loss,
        best_loss=course.best_loss,
        seconds=course.seconds,
        peak_bytes=peak_bytes(device),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        kernel=pair.kernel,
        compute_dtype=str(compute).removeprefix("torch."),
        shared_bytes=pair.shared_bytes,
        resumed_from=resumed_from,
        notes=tuple(notes),
    )


def student_with_adapters(pair: StudentTeacher, recipe: Recover, seed: int) -> PeftModel:
    """The student with adapters; its forward gives hidden states, as the head is part of the loss."""
    model = attach(pair.student, recipe.adapter, pair.spec, seed)
    student = pair.student

    def forward(input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return hidden_states(student, input_ids, position_ids, documents=recipe.document_masking)

    student.forward = forward  # type: ignore[method-assign, assignment]
    body(student).train()
    return model


def _check_sight(model: PeftModel, lines: TrainRows, recipe: Recover, compute: torch.dtype, device: str) -> None:
    """Once, before training: attention crosses skipped positions, and does not cross documents."""
    ids_NT, positions_NT = lines.longest()
    if positions_NT is None:
        return

    def hidden(ids_1T: Tensor, positions_1T: Tensor) -> Tensor:
        with autocast(ids_1T.device, compute):
            return model(input_ids=ids_1T, position_ids=positions_1T)

    model.eval()
    (require_hidden if recipe.document_masking else require_visible)(hidden, ids_NT.to(device), positions_NT.to(device))
    model.train()


def peak_bytes(device: str) -> int:
    """Largest memory so far: of the GPU on CUDA, else resident memory of this process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arguments(
    recipe: Recover, work_dir: Path, rows: int, device: str, seed: int, micro: int | None = None
) -> TrainingArguments:
    """micro: rows of a step that are computed at a time, a divisor of them; by default all."""
    assert recipe.learning_rate is not None
    steps = math.ceil(rows / recipe.batch_size)
    # Newer versions of transformers call it activation checkpointing, and warn of the old name.
    known = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    checkpointing: dict[str, Any] = {f"{known}_checkpointing": recipe.gradient_checkpointing}
    if recipe.gradient_checkpointing:
        checkpointing[f"{known}_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        per_device_train_batch_size=micro or recipe.batch_size,
        gradient_accumulation_steps=recipe.batch_size // (micro or recipe.batch_size),
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup_ratio * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / recipe.checkpoints)),
        save_total_limit=2,
        eval_strategy="no",
        logging_strategy="steps" if recipe.report_to else "no",
        logging_first_step=bool(recipe.report_to),
        logging_steps=max(1, steps // LOGGED),
        logging_nan_inf_filter=False,  # it waits for every loss; `Watch` stops at the first that is not finite
        report_to=list(dict.fromkeys(recipe.report_to)) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device == "cpu",
        **checkpointing,
        seed=seed,
        data_seed=seed,
    )
    # With more than one visible GPU the Trainer would wrap the model in nn.DataParallel, whose replicas our forward
    # (a closure over the original modules) does not reach, and multiply the batch size. Reading n_gpu sets it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _fingerprint(
    student: ModelFolder,
    teacher: ModelFolder | None,
    recipe: Recover,
    lines: TrainRows,
    held_out: TrainRows | None,
    seed: int,
    compute: torch.dtype,
    kernel: str,
) -> str:
    """Everything a checkpoint depends on, so that a run never resumes from another training's."""
    settings = recipe.model_dump_json(exclude={"report_to", "keep_adapter", "allow_repeats"})  # they change no weight
    state = hashlib.sha256(repr((settings, seed, str(compute), kernel)).encode())
    for folder in (student, teacher):
        if folder is not None:
            checkpoint = folder.checkpoint
            state.update(repr((sorted(checkpoint.entries.items()), sorted(checkpoint.config.items()))).encode())
            for shard in checkpoint.shards:
                with (checkpoint.folder / shard).open("rb") as file:
                    state.update(hashlib.file_digest(file, "sha256").digest())
    for rows in (lines, held_out):
        for tensor in () if rows is None else (rows.ids_NT, rows.positions_NT):
            if tensor is not None:
                state.update(tensor.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


@contextmanager
def _tensorboard_folder(logs: Path | None) -> Iterator[None]:
    """In the block TensorBoard's callback is made for this folder, unless the environment names another."""
    if logs is None or TENSORBOARD in os.environ:
        yield
        return
    os.environ[TENSORBOARD] = str(logs)
    try:
        yield
    finally:
        del os.environ[TENSORBOARD]


def _note(notes: list[str], progress: Progress | None, text: str) -> None:
    notes.append(text)
    if progress is not None:
        progress.note(text)
