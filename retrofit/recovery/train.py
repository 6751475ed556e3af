"""Recovery: a short adapter training that brings a changed model back to the original, and the merge afterwards.

The loop is transformers' Trainer (optimizer, schedule, clipping, checkpoints, launchers); the loss is ours.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from retrofit.context.positions import require_hidden, require_visible
from retrofit.data.packing import Packed
from retrofit.errors import UserError
from retrofit.model.folder import ModelFolder, opened
from retrofit.recipe.recovery import distils
from retrofit.recipe.schema import Recover
from retrofit.recovery.adapters import about_experts, attach, default_rate, merge_and_save, save_adapter, trainable
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.callbacks import TrainState, Watch, last_checkpoint
from retrofit.recovery.layout import ONE_PROCESS, Layout
from retrofit.recovery.objectives import token_losses
from retrofit.recovery.on_policy import Writer, marked, own_rows
from retrofit.recovery.out_of_sight import hiding_window, passages, unmeasured
from retrofit.recovery.probe import best_rate, in_words, try_rates
from retrofit.recovery.report import RecoverReport
from retrofit.recovery.schedule import TrainRows, about, check_lengths, held_out_lines, training_lines
from retrofit.recovery.sequence import PLACES, Sharing, shared_kernel, sharing_of
from retrofit.recovery.settings import fingerprint_of, training_arguments
from retrofit.recovery.sharding import in_turn, parallelism, split, split_again, weights_mesh
from retrofit.recovery.student_teacher import (
    StudentTeacher,
    autocast,
    body,
    compute_dtype,
    head_of,
    hidden_states,
    load_student_teacher,
    training_kernel,
)
from retrofit.recovery.token_weights import about_weights, weighed
from retrofit.recovery.trainer import HeldOut, Objective, RecoveryTrainer, trial_step
from retrofit.system.device import micro_batch, steps_between_readings
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from peft import PeftModel

    from retrofit.console import Progress

TENSORBOARD = "TENSORBOARD_LOGGING_DIR"  # where transformers reads TensorBoard's folder


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
    world: World = ALONE,
    layout: Layout = ONE_PROCESS,
) -> RecoverReport:
    """Train adapters on the student and write the merged checkpoint into the existing (staged) folder `out`.

    tokens, held_out: packed rows from `recovery_rows`; without held_out the last weights are kept.
    teacher_folder: the original model (needed for loss: distill). dtype: what is computed in; the checkpoint keeps the
    student's. work_dir: trainer checkpoints; a run that was killed resumes from its last one and ends with the same
    bytes (on the same machine). adapter: an existing folder for the adapter as peft reads it. logs: TensorBoard's
    folder, where `recipe.report_to` names it; without one TENSORBOARD_LOGGING_DIR or work_dir. world, layout: the
    processes that call this with the same arguments, and how they share the work: every number of them gives the same
    losses, up to rounding, and resumes what another number began. The main one writes.

    A training whose loss is not finite any more, or far above that of the start, stops with the best weights so far.

    Raises UserError where it does and nothing was better than the start, saying at which step, what
    `load_student_teacher` and `check_lengths` raise, and, before the first step, when the kernel does not see across
    skipped positions or sees across documents.
    """
    notes: list[str] = []
    cautions: list[str] = []
    work_dir = Path(work_dir)
    student = opened(student_folder)
    taught = distils(recipe)
    if taught and teacher_folder is None:
        raise UserError("distillation needs the original model", where="recover.loss", fix="name it, or use loss: lm")
    compute = compute_dtype(device, dtype)
    teacher = opened(teacher_folder) if taught and teacher_folder is not None else None
    spec = student.spec
    window = spec.max_position_embeddings
    if recipe.learning_rate is None:
        rate = default_rate(spec, None if teacher is None else teacher.spec)
        recipe = recipe.model_copy(update={"learning_rate": rate})
        _note(notes, progress, f"learning rate {rate:.2g}, for a width of {spec.hidden_size}")
    native = window if teacher is None else teacher.spec.max_position_embeddings
    check_lengths(recipe, native, window)
    documents = recipe.document_masking
    shared = shared_kernel(layout.engine, kernel, spec, device, str(compute).removeprefix("torch."))
    mesh = weights_mesh(parallelism(layout), device) if layout.sharded else None

    def load() -> tuple[StudentTeacher, PeftModel]:
        pair = load_student_teacher(
            student,
            teacher,
            device=device,
            dtype=compute,
            kernel="sdpa" if layout.engine == "torch" else kernel,
            documents=documents,
            memory="cpu" if layout.sharded else None,
        )
        model = student_with_adapters(pair, recipe, seed)
        if mesh is not None:
            split(model, pair, mesh, device)
        return pair, model

    pair, model = in_turn(world, load) if layout.sharded else load()
    for text in layout.notes:
        _note(notes, progress, text)
    whole = training_kernel(kernel, spec, device, str(compute).removeprefix("torch."), documents=documents)
    used = shared or whole
    _note(notes, progress, f"training in {str(compute).removeprefix('torch.')} with {used.name}: {used.reason}")
    for text in tokens.read:
        _note(notes, progress, text)
    for text in tokens.notes:
        _note(cautions, progress, text)
    lines = training_lines(tokens, recipe, window, seed)
    own = own_rows(lines, recipe.on_policy)
    lines = marked(lines, own, masked=documents)
    measured = None if held_out is None else held_out_lines(held_out, recipe, window, seed)
    hidden = None if measured is None else hiding_window(pair.spec, pair.teacher_spec)
    again = None if measured is None or hidden is None else passages(measured, hidden)
    if hidden is not None and again is None:
        _note(cautions, progress, unmeasured(hidden))
    sharing = sharing_of(layout, world, pair, device)
    _check_sight(model, lines, recipe, compute, device, sharing)
    for text in (*about(recipe, window, pair.spec), *about_experts(recipe.adapter, pair.spec)):
        _note(notes, progress, text)
    objective = Objective(pair, recipe, sharing)
    fingerprint = world.share(
        fingerprint_of(student, teacher, recipe, lines, measured, seed, compute, whole.name) if world.main else ""
    )
    checkpoint = world.share(last_checkpoint(work_dir, fingerprint) if world.main else None)
    course = TrainState(fingerprint) if checkpoint is None else TrainState.load(checkpoint)
    resumed_from = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    dealt = partial(MicroBatches, every_token=teacher is not None, rank=layout.data_rank, ranks=layout.data_ranks)
    rows = math.ceil(recipe.batch_size / layout.data_ranks)
    attempt = partial(trial_step, objective, model, lines, compute, device)
    # A try that fails in one process would leave those waiting that need its part of the weights, or of a row.
    tied = layout.sharded or layout.sequence > 1
    micro = 1 if tied else min(world.gather(micro_batch(rows, attempt, device)))
    if micro < rows:
        why = "are computed" if tied else "fit into the GPU"
        _note(notes, progress, f"{micro} of the {rows} rows of a step {why} at a time")
    if recipe.token_weights == "long":
        kept = work_dir / f"token-weights-{fingerprint[:32]}.safetensors"
        losses = partial(_row_losses, model, pair, recipe, compute, device, sharing)
        weights_NT = weighed(lines, losses, world=world, layout=layout, kept=kept, progress=progress)
        model.train()
        split_again(model)
        lines = replace(lines, weights_NT=weights_NT)
        _note(notes, progress, about_weights(lines))
    batches = dealt(lines, recipe.batch_size, most=micro)
    if recipe.find_learning_rate:
        how: dict[str, Any] = {"compute": compute, "device": device, "work_dir": work_dir, "seed": seed, "world": world}
        tries = try_rates(model, objective, batches, fingerprint=fingerprint, progress=progress, **how)
        recipe = recipe.model_copy(update={"learning_rate": best_rate(tries)})
        _note(notes, progress, in_words(tries))
    arguments = training_arguments(recipe, work_dir, batches, device, seed)
    steps = arguments.max_steps

    def held_out_loss(rows: TrainRows | None) -> HeldOut | None:
        if rows is None:
            return None
        return HeldOut(objective, model, dealt(rows, layout.data_ranks), compute, device, world)

    watch = Watch(
        course,
        weights=lambda: trainable(model, keep=world.main),
        held_out_loss=held_out_loss(measured),
        passage_loss=held_out_loss(again),
        evaluate_at=frozenset(round(steps * (i + 1) / recipe.evals) for i in range(recipe.evals)) | {steps},
        tokens_per_step=recipe.batch_size * lines.ids_NT.shape[1],
        progress=progress,
        read_every=steps_between_readings(device),
        world=world,
        learned=lambda step: any(lines.learned[(step - 1) * recipe.batch_size : step * recipe.batch_size]),
    )
    if held_out is None:
        _note(cautions, progress, "nothing is held out, so the last weights are kept, not the best")
    if resumed_from:
        _note(notes, progress, f"resuming from step {resumed_from} of {steps}")
    if progress is not None:
        progress.start("recover", steps * watch.tokens_per_step, "tokens")
        progress.advance(resumed_from * watch.tokens_per_step)
    writer = None
    if own:
        _note(notes, progress, f"{len(own)} of the {len(lines.ids_NT)} rows are written by the student while it trains")
        where: dict[str, Any] = {"work_dir": work_dir, "fingerprint": fingerprint, "world": world, "layout": layout}
        writer = Writer(pair, model, batches, own, compute=compute, seed=seed, **where)
    if resumed_from < steps:
        with _tensorboard_folder(logs):
            trainer = RecoveryTrainer(
                objective=objective,
                compute=compute,
                watch=watch,
                writer=writer,
                model=model,
                args=arguments,
                train_dataset=batches,
                callbacks=[watch],
                seed=seed + layout.sequence_rank if recipe.adapter.dropout else None,
            )
        trainer.remove_callback(PrinterCallback)
        watch.log = trainer.log if recipe.report_to else None
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if progress is not None:
        progress.finish()
    if course.stopped:
        _note(cautions, progress, f"stopped early: {course.stopped}; the weights of step {course.best_step} are kept")
    elif course.best_step == 0 and held_out is not None:
        _note(cautions, progress, "no measurement was better than the start; the weights are kept as they were")
    if world.main:
        if adapter is not None:
            save_adapter(model, adapter, course.best)
        merge_and_save(model, student, out, course.best, max_shard_size=max_shard_size, progress=progress)
    world.wait()
    return RecoverReport(
        history=tuple(course.history),
        steps=steps,
        tokens=course.history[-1].step * watch.tokens_per_step if course.stopped else lines.ids_NT.numel(),
        best_step=course.best_step,
        start_loss=course.start_loss,
        best_loss=course.best_loss,
        start_passages=course.start_passages,
        best_passages=course.best_passages,
        seconds=course.seconds,
        peak_bytes=max(world.gather(peak_bytes(device))),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        kernel=used.name,
        compute_dtype=str(compute).removeprefix("torch."),
        shared_bytes=pair.shared_bytes,
        resumed_from=resumed_from,
        notes=(*notes, *cautions),
        cautions=tuple(cautions),
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


def _check_sight(
    model: PeftModel, lines: TrainRows, recipe: Recover, compute: torch.dtype, device: str, sharing: Sharing
) -> None:
    """Once, before training: attention crosses skipped positions, and does not cross documents."""
    ids_NT, positions_NT = lines.skipping()
    if positions_NT is None:
        return

    def hidden(ids_1T: Tensor, positions_1T: Tensor) -> Tensor:
        tokens = ids_1T.shape[1]
        share = sharing.share({"input_ids": ids_1T, "position_ids": positions_1T})
        share.pop(PLACES, None)
        with sharing.attention(tokens), autocast(ids_1T.device, compute):
            return sharing.gather(model(**share), tokens)

    model.eval()
    (require_hidden if recipe.document_masking else require_visible)(hidden, ids_NT.to(device), positions_NT.to(device))
    model.train()
    split_again(model)


@torch.no_grad()
def _row_losses(
    model: PeftModel,
    pair: StudentTeacher,
    recipe: Recover,
    compute: torch.dtype,
    device: str,
    sharing: Sharing,
    ids_1T: Tensor,
) -> Tensor:
    """The student's losses of the tokens of one text from the second on, [T - 1] float32; in evaluation mode, which
    it is left in. Processes that share rows call it together."""
    model.eval()
    tokens = ids_1T.shape[1]
    share = sharing.share({"input_ids": ids_1T.to(device)})
    share.pop(PLACES, None)
    with sharing.attention(tokens), autocast(share["input_ids"].device, compute):
        hidden_1TC = sharing.gather(model(**share), tokens)
    dtype = next(p.dtype for p in pair.student.parameters() if not p.requires_grad)
    labels_T = ids_1T[0, 1:].to(device)
    return token_losses(hidden_1TC[0, :-1].to(dtype), head_of(pair.student), labels_T, recipe.row_chunk).cpu()


def peak_bytes(device: str) -> int:
    """Largest memory so far: of the GPU on CUDA, else resident memory of this process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
