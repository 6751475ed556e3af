"""A synthetic test that is stopped resumes with the haystacks that are left, and ends with the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrofit.console import Silent
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.tasks import asking
from retrofit.evaluation.tasks import needle as needles
from retrofit.evaluation.tasks import ruler as tasks
from retrofit.kernels.registry import choose
from retrofit.model.families import describe
from retrofit.system import resume
from retrofit.system.resume import Kept
from tests.evaluation.test_needle import PROSE
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
META = {"checkpoint": {"model.safetensors": "a"}}


def grid(model: Any, **asked: Any) -> Any:
    how = {"lengths": (700, 500), "depths": (0.0, 0.2, 0.4), "samples": 2, "chunk": 96, "meta": META, **asked}
    return needles.needle(model, TOKENIZER, PROSE, **how)


def multi_key(model: Any, **asked: Any) -> Any:
    return grid(model, multi_key=True, **asked)


def ruler(model: Any, **asked: Any) -> Any:
    how = {"tasks": ("niah_multikey", "frequent_words"), "lengths": (900, 1000), "chunk": 160, "meta": META, **asked}
    return tasks.ruler(model, TOKENIZER, PROSE, **how)


def counted(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[int]:
    """Tokens of every haystack that is read from here on; at question number `stop` the call is stopped."""
    read: list[int] = []
    questions = iter(range(10**6))
    ask = asking.ask

    def stopped(*arguments: Any) -> Any:
        if next(questions) == stop:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(asking, "ask", stopped)

    class Counting(Reader):
        def read(self, ids_T: torch.Tensor) -> None:
            if len(ids_T) > 250:  # no question, of which RULER's are long
                read.append(len(ids_T))
            super().read(ids_T)

    monkeypatch.setattr(asking, "Reader", Counting)
    return read


@pytest.mark.parametrize(
    ("test", "family", "haystacks", "stops"),
    [
        (grid, "llama", 12, (1, 3, 7, 11)),
        (grid, "gemma2", 12, (2, 5)),
        (multi_key, "llama", 4, (1, 4, 11)),
        (ruler, "llama", 4, (1, 5)),
    ],
)
def test_a_stopped_test_ends_with_the_same_bits(
    test: Callable[..., Any],
    family: str,
    haystacks: int,
    stops: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(family, max_position_embeddings=1024)
    whole = test(model)
    for stop in stops:
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patched:
            counted(patched, stop)
            with pytest.raises(KeyboardInterrupt):
                test(model, partial=folder)
        finished = len(list(folder.glob("*-*.json")))
        assert finished < haystacks
        with monkeypatch.context() as patched:
            read = counted(patched)
            assert test(model, partial=folder) == whole
            assert len(read) <= haystacks - finished
            assert finished or stop == 1
            assert test(model, partial=folder) == whole
            assert len(read) <= haystacks - finished, "nothing is read when all is kept"


@pytest.mark.parametrize("test", [grid, ruler])
def test_another_question_is_not_answered_from_what_was_kept(
    test: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    small: dict[str, Any] = {"lengths": (700,), "samples": 1} if test is grid else {"lengths": (900,)}
    double = tiny_model("llama", max_position_embeddings=1024).double()
    eager = replace(choose("eager", describe(model.config), "cpu"), requested="eager")
    others: list[tuple[Any, dict[str, Any]]] = [
        (model, {"meta": {"checkpoint": {"model.safetensors": "b"}}}),
        (model, {"meta": {**META, "tokenizer_sha256": "c"}}),
        (model, {"seed": 1}),
        (model, {"chunk": 48}),
        (model, {"lengths": (950,)}),
        (model, {"kernel": eager}),
        (double, {}),
    ]
    kept = tmp_path / "kept"
    test(model, partial=kept, **small)
    for number, (other, asked) in enumerate(others):
        told, want = Silent(), test(other, **{**small, **asked})
        with monkeypatch.context() as patched:
            read = counted(patched)
            partial = shutil.copytree(kept, tmp_path / str(number))
            assert test(other, partial=partial, progress=told, **{**small, **asked}) == want
        assert read
        assert "answers another question; asked anew" in told.notes[-1], asked
    monkeypatch.setattr(resume, "VERSION", resume.VERSION + 1)
    read = counted(monkeypatch)
    test(model, partial=kept, **small)
    assert read


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    values = {"a": [0.1, 1e-300, float("inf"), float(np.float32(0.1))], "b": "\u00e4", "c": True}
    Kept(tmp_path, {}).put_values("x", values)
    kept = Kept(tmp_path, {})
    assert kept.get_values("x") == values
    assert kept.get_values("y") is None
    assert Kept(None, {}).get_values("x") is None
