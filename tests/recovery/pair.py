"""A tiny student with its teacher, rows to train it on, and a short training."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.data.packing import Packed, training_rows
from retrofit.recipe.schema import Adapter, Recover, Stage, TextSource
from retrofit.recovery.report import RecoverReport
from retrofit.recovery.train import recover
from tests.tiny import save_tiny, tiny_tokenizer

RECIPE = Recover(
    tokens=16 * 48,
    sequence_length=48,
    batch_size=2,
    learning_rate=1e-2,
    row_chunk=32,
    evals=2,
    checkpoints=4,
    adapter=Adapter(rank=4, alpha=8),
)
STAGES = (Stage(length=128, tokens=8 * 48), Stage(length=512, tokens=8 * 48))
MIXED = (Stage(tokens=2 * 48, loss="lm"), Stage(tokens=14 * 48, sequence_length=24, positions="pose"))


def run(folders, rows, root: Path, recipe: Recover = RECIPE, **over) -> RecoverReport:
    out = root / "out"
    out.mkdir(parents=True, exist_ok=True)
    student, teacher = folders
    options = {"dtype": "float32", "kernel": "sdpa", "work_dir": root / "work", **over}
    return recover(student, teacher, out, recipe, *rows, **options)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher): the student is the teacher with other values in its attention."""
    return pair_in(tmp_path_factory.mktemp("pair"))


def pair_in(root: Path, **config: Any) -> tuple[Path, Path]:
    """Such a pair, of this configuration."""
    teacher = save_tiny(root / "teacher", "llama", **config)
    student = save_tiny(root / "student", "llama", **config)
    model = AutoModelForCausalLM.from_pretrained(student)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.v_proj.weight
            weight.add_(0.5 * weight.std() * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(student)
    return student, teacher


@pytest.fixture(scope="session")
def rows() -> tuple[Packed, Packed]:
    tokenizer = tiny_tokenizer()
    source = (TextSource(source="python-docs"),)
    train = training_rows(source, tokenizer, RECIPE.tokens, RECIPE.sequence_length, 0)
    held_out = training_rows(source, tokenizer, 96, RECIPE.sequence_length, 0, "held_out")
    return train, held_out
