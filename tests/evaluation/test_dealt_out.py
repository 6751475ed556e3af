"""An evaluation by several processes: the numbers of one, and what is resumed by any number of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrofit.data.documents import Document
from retrofit.evaluation.continuations import Continuation, continuations
from retrofit.evaluation.long_context import Measured, measure
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.score import score
from retrofit.evaluation.scoring.windows import Windows
from retrofit.evaluation.tasks.asking import TextReader
from retrofit.evaluation.tasks.needle import NeedleResult, depths, needle
from retrofit.recipe.schema import Evaluate
from retrofit.system.world import ALONE, World
from tests.evaluation.test_needle import PROSE
from tests.evaluation.test_score import document
from tests.ranks import on_ranks
from tests.tiny import tiny_model, tiny_tokenizer

LENGTHS = (130, 40, 200, 75, 64)  # of the documents: they differ, and divide by no number of processes
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


def documents() -> list[Document]:
    return [document(tokens, f"d{i}", seed=i) for i, tokens in enumerate(LENGTHS)]


def evaluated(world: World, partial: Path | None = None) -> tuple[TokenLosses, TokenLosses, Measured]:
    """Whole documents, moving windows over what is known, and everything else that is asked of a model."""
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    texts = documents()
    losses = score(model, texts, chunk=16, world=world, partial=partial and partial / "full")
    windows = Windows(32, 8)
    moving = score(model, texts, windows=windows, known=losses, chunk=16, world=world)
    section = Evaluate.model_validate(
        {
            "lengths": [40],
            "chunk": 32,
            "needle": {"lengths": [256], "depths": 2, "samples": 2},
            "ruler": {"lengths": [400], "samples": 1, "tasks": ["niah_single", "variable_tracking"]},
        }
    )
    measured = measure(model, tokenizer, texts, losses, section, 512, partial=partial, world=world)
    return losses, moving, measured


def same(one: TokenLosses, other: TokenLosses) -> bool:
    """Bit for bit, and the same record beside them."""
    arrays = zip((*one.losses, *one.token_bytes), (*other.losses, *other.token_bytes), strict=True)
    return one.meta == other.meta and all(np.array_equal(a, b, equal_nan=True) for a, b in arrays)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_number_is_that_of_one_process(ranks: int, tmp_path: Path) -> None:
    losses, moving, measured = evaluated(ALONE)
    for found in on_ranks(tmp_path, ranks, evaluated):
        assert same(found[0], losses)
        assert same(found[1], moving)
        assert found[2].needle == measured.needle
        assert found[2].ruler == measured.ruler


def scored_by_length(world: World) -> TokenLosses:
    return score(tiny_model("llama", **DYNAMIC, max_position_embeddings=64), documents(), lengths=(32, 40), world=world)


def test_the_passes_of_a_changing_encoding_are_dealt_out(tmp_path: Path) -> None:
    alone = scored_by_length(ALONE)
    for found in on_ranks(tmp_path, 2, scored_by_length):
        assert same(found, alone)
        assert found.by_length.keys() == alone.by_length.keys()
        for length, arrays in alone.by_length.items():
            assert all(np.array_equal(a, b) for a, b in zip(found.by_length[length], arrays, strict=True))


def written(world: World) -> tuple[Continuation, ...]:
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    return continuations(model, tokenizer, documents(), tokens=8, world=world)


def test_continuations_are_those_of_one_process(tmp_path: Path) -> None:
    alone = written(ALONE)
    assert len(alone) == 3
    assert on_ranks(tmp_path, 2, written) == [alone, alone]


def scored(world: World, partial: Path) -> tuple[TokenLosses, int]:
    """The losses, and how many passes this process made."""
    made: list[Any] = []
    model = tiny_model("llama")
    model.get_decoder().register_forward_hook(lambda *_: made.append(1))
    return score(model, documents(), chunk=512, partial=partial, world=world), len(made)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_what_is_kept_is_resumed_by_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    first = run(before, tmp_path, partial)
    assert sum(made for _, made in first) == len(LENGTHS)
    for file in sorted(partial.glob("*.npy"))[:3]:
        file.unlink()
    again = run(after, tmp_path, partial)
    assert sum(made for _, made in again) == 3
    assert all(same(losses, first[0][0]) for losses, _ in again)


def run(size: int, folder: Path, partial: Path) -> list[tuple[TokenLosses, int]]:
    return [scored(ALONE, partial)] if size == 1 else on_ranks(folder, size, scored, partial)


def broken(world: World, partial: Path) -> None:
    model, texts = tiny_model("llama"), documents()
    if world.rank == 1:  # something that one process alone meets
        model.get_input_embeddings().weight.data.fill_(np.nan)

        def wait(*_: object) -> None:  # the test ends the others as soon as one has failed
            while not list(partial.glob("*.npy")):
                time.sleep(0.01)

        model.get_input_embeddings().register_forward_pre_hook(wait)
    score(model, texts, partial=partial, world=world)


def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank"):
        on_ranks(tmp_path, 2, broken, tmp_path / "partial", seconds=30)
    assert list((tmp_path / "partial").glob("*.npy"))  # what the other one finished is kept


def asked_once(world: World) -> tuple[NeedleResult, int]:
    """A grid of needles, and how many haystacks this process read."""
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    read: list[Any] = []
    answers = TextReader.answers
    TextReader.answers = lambda self, text, *rest: read.append(text) or answers(self, text, *rest)  # type: ignore[method-assign]
    try:
        found = needle(model, tokenizer, PROSE, lengths=(200, 300), depths=depths(3), chunk=32, world=world)
    finally:
        TextReader.answers = answers  # type: ignore[method-assign]
    return found, len(read)


def test_the_needles_of_a_haystack_stay_together_while_there_is_one_for_everybody(tmp_path: Path) -> None:
    assert [count for _, count in on_ranks(tmp_path, 2, asked_once)] == [3, 3]


def test_more_processes_than_haystacks_share_their_needles(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 4, asked_once)
    assert sum(count for _, count in found) == 6
    assert max(count for _, count in found) == 2
    assert all(result == found[0][0] for result, _ in found)
