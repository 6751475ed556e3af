"""What is measured on a GPU is put where the model is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.context.search.halving import search
from retrofit.evaluation.continuations import _greedy
from retrofit.evaluation.scoring.score import score
from retrofit.evaluation.tasks.common_knowledge import CommonKnowledge, ask
from retrofit.kernels.registry import KernelChoice
from tests.context.test_search import SECTION, text
from tests.evaluation.test_score import document
from tests.pretend_gpu import pretend_gpu
from tests.tiny import tiny_model, tiny_tokenizer

SDPA = KernelChoice("sdpa", "sdpa", "for a GPU that is none")


def scored(device: str, folder: Path) -> object:
    return score(tiny_model("llama").to(device), [document(100)], chunk=32, kernel=SDPA).losses[0].tolist()


def questioned(device: str, folder: Path) -> object:
    task, model = CommonKnowledge.of(8), tiny_model("llama").to(device)
    return ask(task, model, tiny_tokenizer(), tokens=256, kernel=SDPA).rows()


def continued(device: str, folder: Path) -> object:
    return _greedy(tiny_model("llama").to(device), [1, 5, 9], 6, frozenset())


def searched(device: str, folder: Path) -> object:
    model = tiny_model("llama", max_position_embeddings=512).to(device)
    return search(model, tiny_tokenizer(), text(), section=SECTION, partial=folder / device).winner.label


@pytest.mark.parametrize("measure", [scored, questioned, continued, searched])
def test_a_gpu_gives_what_the_cpu_gives(
    measure: Callable[[str, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure("cpu", tmp_path)
    with pretend_gpu(monkeypatch) as device:
        assert measure(device, tmp_path) == expected
