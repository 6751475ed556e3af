"""Rows that the student writes: which, how they depend on seed and weights alone, and what resumes with them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from retrofit.data.packing import Packed, training_rows
from retrofit.data.sampling import random_numbers
from retrofit.recipe.schema import Adapter, Distribute, Recover, Stage, TextSource
from retrofit.recovery.callbacks import Watch
from retrofit.recovery.on_policy import REFRESH, TOGETHER, Writer, blocks, marked, own_rows
from retrofit.recovery.schedule import TrainRows
from tests.ranks import on_ranks
from tests.recovery.test_distributed import Killed, alone, require_same, require_same_weights, train
from tests.tiny import save_tiny, tiny_tokenizer

LENGTH = 48
RECIPE = Recover(
    tokens=16 * LENGTH,
    sequence_length=LENGTH,
    batch_size=2,
    learning_rate=1e-2,
    row_chunk=32,
    evals=2,
    checkpoints=4,
    on_policy=0.5,
    adapter=Adapter(rank=4, alpha=8),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher)."""
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", "llama", seed=5), save_tiny(root / "teacher", "llama")


@pytest.fixture(scope="module")
def rows() -> tuple[Packed, Packed]:
    source, tokenizer = (TextSource(source="python-docs"),), tiny_tokenizer()
    train = training_rows(source, tokenizer, RECIPE.tokens, LENGTH, 0)
    return train, training_rows(source, tokenizer, 2 * LENGTH, LENGTH, 0, "held_out")


def plain(rows: int, learned: tuple[bool, ...] = ()) -> TrainRows:
    return TrainRows(torch.zeros(rows, 8, dtype=torch.long), None, (8,) * rows, learned=learned)


def digest(root: Path) -> str:
    return hashlib.sha256((root / "out" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 2), (0.25, 5), (1 / 3, 6), (0.5, 10), (1.0, 20)])
def test_the_share_is_spread_evenly(share: float, count: int) -> None:
    own = own_rows(plain(20), share)
    assert len(own) == count
    assert all(abs(sum(row < stop for row in own) - stop * share) < 1 for stop in range(21))


def test_rows_that_are_learned_from_the_text_stay_text() -> None:
    assert own_rows(plain(8, (False,) * 4 + (True,) * 4), 0.5) == (1, 3)


def test_blocks_hold_every_row_once_and_are_never_old() -> None:
    own = own_rows(plain(400), 0.75)
    found = blocks(own, (LENGTH,) * 400, 200, 2)
    assert tuple(row for block in found for row in block.rows) == own
    assert max(len(block.rows) for block in found) <= TOGETHER
    assert all(block.start == block.rows[0] // 2 for block in found)
    assert max(block.rows[-1] // 2 - block.start for block in found) < 200 // REFRESH
    assert max(len(block.rows) for block in found) > 20


def test_a_large_step_is_one_block_and_stages_are_apart() -> None:
    assert [len(block.rows) for block in blocks(range(300), (LENGTH,) * 300, 3, 100)] == [100, 100, 100]
    assert [block.rows for block in blocks(range(4), (8, 8, 4, 4), 32, 1)] == [(0, 1), (2, 3)]


def test_own_rows_count_as_a_whole_and_are_one_document() -> None:
    lines = TrainRows(
        torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long), (8, 4, 8), torch.zeros(3, 8) > 0
    )
    found = marked(lines, (1, 2), masked=True)
    assert found.positions_NT is not None
    assert found.counted_NT is not None
    assert found.positions_NT.tolist() == [[0] * 8, [0, 1, 2, 3] * 2, list(range(8))]
    assert found.counted_NT.tolist() == [[False] * 8, [True] * 8, [True] * 8]


def test_the_student_writes_what_plain_sampling_of_its_weights_gives(folders, rows, tmp_path, monkeypatch) -> None:
    """At the first step: its adapters are zero. And what it writes is what is trained on."""
    seen, real = {}, Writer.__call__

    def call(self, step, inputs):
        filled = real(self, step, inputs)
        seen[step] = (inputs["input_ids"], filled["input_ids"])
        return filled

    monkeypatch.setattr(Writer, "__call__", call)
    alone(folders, rows, tmp_path, RECIPE)
    student = AutoModelForCausalLM.from_pretrained(folders[0])
    text, filled = seen[0]
    assert torch.equal(text[0], filled[0])
    assert not torch.equal(text[1], filled[1])
    given, numbers = LENGTH // 8, random_numbers("3 row 1 text 0", LENGTH - 1)
    ids = text[1, :given].tolist()
    while len(ids) < LENGTH:
        with torch.no_grad():
            ends = student(torch.tensor([ids])).logits[0, -1].softmax(-1).cumsum(-1)
        ids.append(int((ends <= numbers[len(ids) - 1]).sum()))
    assert filled[1].tolist() == ids
    assert torch.equal(seen[1][1][1, :1], seen[1][0][1, :1])  # every second row begins with its first token alone
    assert not torch.equal(seen[1][1][1, 1:4], seen[1][0][1, 1:4])


def test_it_brings_the_student_nearer(folders, rows, tmp_path) -> None:
    report = alone(folders, rows, tmp_path, RECIPE.model_copy(update={"on_policy": 1.0, "divergence": "jsd"}))
    assert report.best_loss < 0.98 * report.start_loss
    assert any("16 of the 16 rows are written by the student" in note for note in report.notes)


@pytest.mark.parametrize("gone", [False, True], ids=["kept", "written again"])
@pytest.mark.parametrize("positions", ["full", "pose"])
def test_a_killed_run_ends_with_the_same_bytes(folders, rows, tmp_path, monkeypatch, positions, gone) -> None:
    recipe = RECIPE.model_copy(update={"positions": positions, "adapter": Adapter(rank=4, alpha=8, dropout=0.1)})
    whole = alone(folders, rows, tmp_path / "whole", recipe)
    monkeypatch.setattr(Watch, "on_step_end", Watch.on_step_end)  # which dying replaces
    with pytest.raises(Killed):
        alone(folders, rows, tmp_path / "killed", recipe, kill_at=5)
    monkeypatch.undo()
    if gone:
        for file in (tmp_path / "killed/work").glob("written-*"):
            file.unlink()
    again = alone(folders, rows, tmp_path / "killed", recipe)
    assert again.resumed_from == 4
    require_same(again, whole, rel=0)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_rows_of_another_training_are_not_read(folders, rows, tmp_path) -> None:
    alone(folders, rows, tmp_path / "fresh", RECIPE.model_copy(update={"learning_rate": 5e-3}))
    alone(folders, rows, tmp_path / "used", RECIPE)
    alone(folders, rows, tmp_path / "used", RECIPE.model_copy(update={"learning_rate": 5e-3}))
    assert digest(tmp_path / "used") == digest(tmp_path / "fresh")


def test_stages_and_masked_documents(folders, rows, tmp_path) -> None:
    stages = (Stage(length=LENGTH // 2, tokens=8 * LENGTH), Stage(length=LENGTH, tokens=8 * LENGTH))
    recipe = RECIPE.model_copy(update={"stages": stages, "document_masking": True})
    packed = [replace(one, documents_NT=torch.arange(LENGTH).expand_as(one.ids_NT) // 20) for one in rows]
    report = alone(folders, packed, tmp_path, recipe)
    assert report.best_loss < report.start_loss


def test_trained_embeddings_write_with_the_trained_head(folders, rows, tmp_path) -> None:
    tied = save_tiny(tmp_path / "tied", "llama", seed=5, tie_word_embeddings=True)
    recipe = RECIPE.model_copy(update={"adapter": Adapter(rank=4, alpha=8, embeddings=True)})
    report = alone((tied, folders[1]), rows, tmp_path, recipe)
    assert report.best_loss < report.start_loss


@pytest.mark.parametrize("distribute", [Distribute(), Distribute(shard=2), Distribute(sequence=2)])
def test_two_processes_train_as_one(folders, rows, tmp_path, distribute) -> None:
    recipe = RECIPE.model_copy(update={"distribute": distribute})
    kernel = {"kernel": "blockwise"}
    one = alone(folders, rows, tmp_path / "one", RECIPE, **kernel)
    for report in on_ranks(tmp_path, 2, train, folders, rows, tmp_path / "two", recipe, kernel):
        require_same(report, one, rel=1e-4)
    require_same_weights(tmp_path / "two", tmp_path / "one")


def test_without_a_teacher_it_is_refused() -> None:
    with pytest.raises(ValidationError, match="judged by the original"):
        Recover(on_policy=0.25, loss="lm")


@pytest.mark.parametrize("share", [1.01, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValidationError, match="on_policy"):
        Recover(on_policy=share)
