"""What the two models of a recovery compute in, and with which kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrofit.errors import UserError
from retrofit.model.load import load_config, load_model
from retrofit.recovery.student_teacher import compute_dtype, load_student_teacher
from tests.tiny import save_tiny


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, "products"), (torch.float32, "sdpa")])
def test_both_models_get_the_kernel_of_the_registry(dtype: torch.dtype, kernel: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    pair = load_student_teacher(folder, folder, device="cpu", dtype=dtype, kernel="auto")
    assert pair.teacher is not None
    assert pair.kernel == kernel
    assert pair.kernel_reason
    assert {model.config._attn_implementation for model in (pair.student, pair.teacher)} == {kernel}
    assert torch.isfinite(pair.student(torch.arange(20)[None], use_cache=False).logits).all()


@pytest.mark.parametrize(
    ("family", "dropouts"),
    [
        ("llama", ["attention_dropout"]),
        ("gpt_bigcode", ["attn_pdrop", "resid_pdrop", "embd_pdrop"]),
        ("phi", ["attention_dropout", "resid_pdrop", "embd_pdrop"]),
        ("stablelm", ["attention_dropout", "hidden_dropout"]),
        ("starcoder2", ["attention_dropout", "residual_dropout", "embedding_dropout"]),
    ],
)
@pytest.mark.parametrize("kernel", ["sdpa", "blockwise"])
def test_a_student_trains_without_its_own_dropout(
    family: str, dropouts: list[str], kernel: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", family, **dict.fromkeys(dropouts, 0.5))
    student = load_student_teacher(folder, None, device="cpu", dtype=torch.float32, kernel=kernel).student
    ids = torch.arange(20)[None]
    still = student(ids, use_cache=False).logits
    torch.testing.assert_close(student.train()(ids, use_cache=False).logits, still)
    assert all(load_config(folder).to_dict()[name] == 0.5 for name in dropouts)  # the checkpoint keeps its settings
    noisy = load_model(folder, dtype="float32").train()
    assert not torch.allclose(noisy(ids, use_cache=False).logits, still)


def test_the_compute_dtype_follows_the_processor(bfloat16_products: bool) -> None:
    assert compute_dtype("cpu") == (torch.bfloat16 if bfloat16_products else torch.float32)
    assert compute_dtype("cpu", "bfloat16") == torch.bfloat16
    assert compute_dtype("cpu", "float32") == torch.float32
    with pytest.raises(UserError, match="float16"):
        compute_dtype("cpu", "float16")
