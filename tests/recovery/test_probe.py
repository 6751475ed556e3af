"""The probe of learning rates: what it tries, that it leaves no trace in the training, and that it is not run twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from retrofit.data.packing import Packed, training_rows
from retrofit.errors import UserError
from retrofit.recipe.schema import Adapter, Recover, TextSource
from retrofit.recovery.probe import TriedRate, best_rate, in_words
from tests.ranks import on_ranks
from tests.recovery.test_distributed import alone, require_same, train
from tests.recovery.test_on_policy import digest
from tests.tiny import save_tiny, tiny_tokenizer

LENGTH = 16
RECIPE = Recover(
    tokens=96 * 2 * LENGTH,
    sequence_length=LENGTH,
    batch_size=2,
    find_learning_rate=True,
    evals=2,
    checkpoints=2,
    adapter=Adapter(rank=2, alpha=4, dropout=0.1),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", "llama", seed=5), save_tiny(root / "teacher", "llama")


@pytest.fixture(scope="module")
def rows() -> tuple[Packed, Packed]:
    source, tokenizer = (TextSource(source="python-docs"),), tiny_tokenizer()
    text = training_rows(source, tokenizer, RECIPE.tokens, LENGTH, 0)
    return text, training_rows(source, tokenizer, 2 * LENGTH, LENGTH, 0, "held_out")


def test_the_training_is_that_at_the_rate_which_is_taken(folders, rows, tmp_path, monkeypatch) -> None:
    report = alone(folders, rows, tmp_path / "auto", RECIPE)
    [note] = [note for note in report.notes if "steps each" in note]
    assert "by the loss of 8 steps each (0.003: " in note
    rate = max(point.learning_rate for point in report.history)
    assert f"learning rate {rate:.2g}, " in note
    alone(
        folders,
        rows,
        tmp_path / "given",
        RECIPE.model_copy(update={"learning_rate": rate, "find_learning_rate": False}),
    )
    assert digest(tmp_path / "given") == digest(tmp_path / "auto")

    monkeypatch.setattr("retrofit.recovery.probe.training_arguments", None)  # another try would fail
    again = alone(folders, rows, tmp_path / "auto", RECIPE)
    assert note in again.notes
    assert again.resumed_from == again.steps


def test_two_processes_take_the_same(folders, rows, tmp_path, monkeypatch) -> None:
    recipe = RECIPE.model_copy(update={"adapter": Adapter(rank=2, alpha=4)})
    one = alone(folders, rows, tmp_path / "one", recipe)
    for report in on_ranks(tmp_path, 2, train, folders, rows, tmp_path / "two", recipe):
        require_same(report, one, rel=1e-3)


def test_the_lowest_finite_loss_is_taken() -> None:
    tries = (TriedRate(1e-3, 8, 0.5), TriedRate(3e-3, 8, 0.4), TriedRate(9e-3, 8, None))
    assert best_rate(tries) == 3e-3
    assert in_words(tries).endswith("(0.001: 0.5, 0.003: 0.4, 0.009: not finite)")


def test_no_finite_loss_is_an_error() -> None:
    with pytest.raises(UserError, match="not finite at any rate"):
        best_rate((TriedRate(1e-3, 8, None),))


def test_a_training_too_short_for_tries_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs 96 steps"):
        Recover(tokens=16_384, find_learning_rate=True)
