"""What a training is started with: the Trainer's arguments, and the fingerprint that its checkpoints are known by."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Recover
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.schedule import TrainRows

LOGGED = 200  # lines that a training logs where it reports, about
FORM = 2  # of a checkpoint: one of another form is not resumed
CHANGE_NO_WEIGHT = {"report_to", "keep_adapter", "allow_repeats", "distribute", "sequence_engine"}


def training_arguments(
    recipe: Recover, work_dir: Path, batches: MicroBatches, device: str, seed: int
) -> TrainingArguments:
    """The Trainer's arguments for the micro-batches of this process."""
    assert recipe.learning_rate is not None
    steps = batches.steps
    # Newer versions of transformers call it activation checkpointing, and warn of the old name.
    known = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    checkpointing: dict[str, Any] = {f"{known}_checkpointing": recipe.gradient_checkpointing}
    if recipe.gradient_checkpointing:
        checkpointing[f"{known}_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        per_device_train_batch_size=batches.rows,
        gradient_accumulation_steps=batches.per_step,
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
        ddp_find_unused_parameters=False,  # every step uses all that is trained; the head outside the model's forward
        **checkpointing,
        seed=seed,
        data_seed=seed,
    )
    # With more than one visible GPU the Trainer would wrap the model in nn.DataParallel, whose replicas our forward
    # (a closure over the original modules) does not reach, and multiply the batch size. Reading n_gpu sets it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def fingerprint_of(
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
    settings = recipe.model_dump_json(exclude=CHANGE_NO_WEIGHT)
    state = hashlib.sha256(repr((FORM, settings, seed, str(compute), kernel)).encode())
    for folder in (student, teacher):
        if folder is not None:
            checkpoint = folder.checkpoint
            state.update(repr((sorted(checkpoint.entries.items()), sorted(checkpoint.config.items()))).encode())
            for shard in checkpoint.shards:
                with (checkpoint.folder / shard).open("rb") as file:
                    state.update(hashlib.file_digest(file, "sha256").digest())
    for rows in (lines, held_out):
        for tensor in () if rows is None else (rows.ids_NT, rows.positions_NT, rows.counted_NT):
            if tensor is not None:
                state.update(tensor.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
