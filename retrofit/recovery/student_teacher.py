"""The two models of a recovery: the original as teacher, the changed one as student, and one copy of what they share.

Legend: B batch, T tokens, N = B T rows, C model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrofit.errors import UserError
from retrofit.kernels import registry
from retrofit.model.folder import ModelFolder, opened
from retrofit.model.load import product_dtype
from retrofit.model.spec import AttentionSpec
from retrofit.recovery.objectives import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MASK_KERNELS = ("sdpa", "eager")


@dataclass(frozen=True)
class StudentTeacher:
    """Student and teacher (None for the plain language-model loss), both frozen and in the compute dtype.

    spec, teacher_spec: of the student and the teacher. shared_bytes: bytes of the teacher that are the student's own
    storage.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    spec: AttentionSpec
    kernel: str
    kernel_reason: str
    shared_bytes: int
    teacher_spec: AttentionSpec | None = None


def load_student_teacher(
    student_folder: str | Path | ModelFolder,
    teacher_folder: str | Path | ModelFolder | None,
    *,
    device: str,
    dtype: torch.dtype,
    kernel: str,
    documents: bool = False,
    memory: str | None = None,
) -> StudentTeacher:
    """Load both models; tensors that are equal in both exist once. documents: rows hold documents kept apart by a mask.
    memory: where they are put, by default on the device that computes.

    Raises UserError if the two do not speak the same vocabulary, or the kernel cannot train this model.
    """
    student_model = opened(student_folder)
    spec = student_model.spec
    teacher_model = None if teacher_folder is None else opened(teacher_folder)
    if teacher_model is not None:
        require_same_vocabulary(teacher_model.spec, spec, str(teacher_model.path))
    name = str(dtype).removeprefix("torch.")
    choice = training_kernel(kernel, spec, device, name, documents=documents)
    # A short training towards a still teacher needs no noise, and kernels without dropout can then train every model.
    student = student_model.load(dtype=name, device=memory or device, dropout=False)
    teacher = None
    shared = 0
    if teacher_model is not None:
        teacher = teacher_model.load(dtype=name, device=memory or device).requires_grad_(False)
        shared = share_weights(teacher, student)
        registry.apply(teacher, choice)
    registry.apply(student, choice)
    taught = None if teacher_model is None else teacher_model.spec
    return StudentTeacher(student.requires_grad_(False), teacher, spec, choice.name, choice.reason, shared, taught)


def training_kernel(
    kernel: str, spec: AttentionSpec, device: str, dtype: str, *, documents: bool = False
) -> registry.KernelChoice:
    """The kernel that a model is trained with. documents: rows hold documents kept apart by a mask.

    Raises UserError for one that cannot train this model.
    """
    if documents:
        return _kernel_with_masks(kernel, spec, device, dtype)
    return registry.choose(kernel, spec, device, training=True, dtype=dtype)


def require_same_vocabulary(teacher: AttentionSpec, student: AttentionSpec, where: str) -> None:
    """UserError unless distillation compares predictions of the same tokens."""
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"the original model's vocabulary has {teacher.vocab_size} tokens, this one's {student.vocab_size}",
            where=where,
            fix="name the model that this one was converted from, or set recover.loss: lm",
        )


def _kernel_with_masks(kernel: str, spec: AttentionSpec, device: str, dtype: str) -> registry.KernelChoice:
    """The kernel of rows whose documents are kept apart: one that reads masks."""
    if kernel not in ("auto", *MASK_KERNELS):
        raise UserError(
            f"kernel `{kernel}` does not keep packed documents apart",
            where="kernel, with recover.document_masking",
            fix=f"use kernel: {' or '.join(MASK_KERNELS)} (or auto), or leave out document_masking",
        )
    if kernel != "auto":
        return registry.choose(kernel, spec, device, training=True, dtype=dtype)
    plain = not any(layer.softcap is not None or layer.sinks for layer in spec.layers)
    choice = registry.choose("sdpa" if plain else "eager", spec, device, training=True, dtype=dtype)
    return registry.KernelChoice(
        "auto", choice.name, "packed documents need a mask, which the faster kernels do not read"
    )


def share_weights(teacher: nn.Module, student: nn.Module) -> int:
    """Let every tensor of the teacher that equals the student's be the student's storage -> bytes shared."""
    known = dict(student.named_parameters(remove_duplicate=False))
    shared = 0
    for name, parameter in teacher.named_parameters():
        other = known.get(name)
        if (
            other is not None
            and other.shape == parameter.shape
            and other.dtype == parameter.dtype
            and torch.equal(other, parameter)
        ):
            parameter.data = other.data
            shared += parameter.nbytes
    return shared


def compute_dtype(device: str, requested: str = "auto") -> torch.dtype:
    """What training computes in: bfloat16 where the processor multiplies in it, else float32.

    Raises UserError for float16, whose gradients need a scaling that this training does not do.
    """
    if requested == "float16":
        raise UserError("training in float16 is not supported", where="dtype", fix="use bfloat16, float32 or auto")
    if requested != "auto":
        return torch.bfloat16 if requested == "bfloat16" else torch.float32
    return product_dtype(device) or torch.float32


def autocast(device: torch.device, dtype: torch.dtype, *, cache: bool = True) -> Any:
    """Autocast to `dtype`; off for float32. cache: weights that are cast are kept until the block ends."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=cache)


def body(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head; its `last_hidden_state` is what the head reads."""
    inner = getattr(model, model.base_model_prefix)
    assert isinstance(inner, nn.Module)
    return inner


def hidden_states(
    model: PreTrainedModel, input_ids_BT: Tensor, positions_BT: Tensor | None = None, *, documents: bool = False
) -> Tensor:
    """What the head reads, [B, T, C]. positions_BT: where the tokens stand, by default 0 .. T-1.

    documents: positions that start again begin a document, which does not see those before it. Otherwise a row is one
    text whatever its positions: only a mask of ones keeps transformers from reading every jump as a new document.
    """
    mask_BT = None if positions_BT is None or documents else torch.ones_like(input_ids_BT)
    given = {} if positions_BT is None else {"position_ids": positions_BT, "attention_mask": mask_BT}
    hidden: Tensor = body(model)(input_ids=input_ids_BT, use_cache=False, **given).last_hidden_state
    return hidden


def head_of(model: PreTrainedModel) -> Head:
    """The output head with what the architecture does to its logits.

    For a tied head that is trained with the input embedding (modules_to_save), the trained copy is the weight.
    """
    from peft.utils.other import ModulesToSaveWrapper

    tied = bool(model.config.tie_word_embeddings)
    module: Any = model.get_output_embeddings()
    if tied:
        embedding: Any = body(model).get_input_embeddings()  # type: ignore[operator]
        if isinstance(embedding, ModulesToSaveWrapper):
            module = embedding
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, getattr(module, "bias", None), scale, None if softcap is None else float(softcap))
