"""Training at other positions and lengths, over documents that do not see each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.data.packing import Packed
from retrofit.errors import UserError
from retrofit.recipe.schema import Adapter, Stage
from retrofit.recovery.schedule import training_lines
from retrofit.recovery.token_weights import text_weights
from tests.recovery.pair import MIXED, RECIPE, folders, rows, run
from tests.tiny import save_tiny

__all__ = ["folders", "rows"]  # fixtures


def test_one_schedule_learns_long_rows_and_follows_the_original_on_short_ones(folders, rows, tmp_path: Path) -> None:
    """The first two steps, before anything has changed, against plain references: each the mean of its own loss."""
    recipe = RECIPE.model_copy(update={"stages": MIXED})
    report = run(folders, rows, tmp_path, recipe)
    student, teacher = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in folders)
    lines = training_lines(rows[0], recipe, 512, 0)
    with torch.no_grad():
        learned = student(rows[0].ids_NT[:2], labels=rows[0].ids_NT[:2]).loss
        ids_BT, positions_BT = rows[0].ids_NT[2:4].view(-1, 24), lines.positions_of([2, 3])
        log_t = teacher(ids_BT).logits.log_softmax(-1)
        log_s = student(ids_BT, position_ids=positions_BT, attention_mask=torch.ones_like(ids_BT)).logits.log_softmax(
            -1
        )
    followed = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert report.history[1].loss == pytest.approx(float(learned), rel=1e-5)
    assert report.history[2].loss == pytest.approx(float(followed), rel=1e-4)
    assert any("rows of 48 tokens are learned from the text" in note for note in report.notes)


def test_tokens_that_need_the_long_context_count_more(folders, rows, tmp_path: Path) -> None:
    """The first step, before anything has changed: the weighted mean of the plain losses."""
    recipe = RECIPE.model_copy(update={"stages": MIXED, "token_weights": "long"})
    report = run(folders, rows, tmp_path, recipe)
    student = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)

    def losses(ids_1T: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(student(ids_1T).logits[0, :-1], ids_1T[0, 1:], reduction="none")

    ids_NT = rows[0].ids_NT[:2]
    each = torch.stack([losses(row[None]) for row in ids_NT])
    weights = torch.stack([text_weights(losses, row)[:-1] for row in ids_NT])
    assert report.history[1].loss == pytest.approx(float((each * weights).sum() / weights.sum()), rel=1e-5)
    assert report.history[1].loss != pytest.approx(float(each.mean()), rel=1e-3)
    assert any("have a mean weight of" in note for note in report.notes)


@pytest.mark.parametrize("kernel", ["sdpa", "blockwise"])
def test_skipped_positions_are_trained_from_a_teacher_at_ordinary_ones(folders, rows, tmp_path, kernel) -> None:
    recipe = RECIPE.model_copy(update={"positions": "pose", "pose_chunks": 3})
    report = run(folders, rows, tmp_path, recipe, kernel=kernel)
    assert report.start_loss is not None
    assert report.best_loss is not None
    assert report.best_loss < 0.8 * report.start_loss
    assert any("reach 512 positions; 35% of the rows" in note for note in report.notes)


def test_a_schedule_of_lengths_with_norms_and_embeddings(folders, rows, tmp_path: Path) -> None:
    stages = (Stage(length=16, tokens=8 * 48), Stage(length=48, tokens=8 * 48))
    adapter = Adapter(rank=4, alpha=8, norms=True, embeddings=True)
    recipe = RECIPE.model_copy(update={"loss": "lm", "stages": stages, "adapter": adapter})
    report = run((folders[0], None), rows, tmp_path, recipe)
    assert report.best_loss is not None
    assert report.start_loss is not None
    assert report.best_loss < report.start_loss
    assert report.steps == 8
    assert any("rows of 16, then 48 tokens" in note for note in report.notes)
    before, after = Checkpoint.open(folders[0]), Checkpoint.open(tmp_path / "out")
    assert not any(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = rows[1].ids_NT
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(student(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report.best_loss == pytest.approx(float(loss), rel=1e-4)


def test_masked_documents_are_trained_with_a_kernel_that_reads_masks(folders, rows, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"document_masking": True})
    documents = [Packed(one.ids_NT, torch.arange(48).expand_as(one.ids_NT) // 20) for one in rows]
    report = run(folders, documents, tmp_path, recipe, kernel="auto", dtype="bfloat16")
    assert report.kernel == "sdpa"
    assert "do not read" in report.notes[0]
    assert report.best_loss is not None
    assert report.best_loss < report.start_loss
    with pytest.raises(UserError, match="does not keep packed documents apart"):
        run(folders, documents, tmp_path / "refused", recipe, kernel="blockwise")


def test_a_teacher_is_not_asked_beyond_its_window(folders, rows, tmp_path: Path) -> None:
    short = save_tiny(tmp_path / "short", "llama", max_position_embeddings=32)
    with pytest.raises(UserError, match="reads 32 tokens") as caught:
        run((folders[0], short), rows, tmp_path)
    assert "loss: lm" in str(caught.value.fix)


def test_a_kernel_that_does_not_cross_the_skips_is_found_before_training(folders, rows, tmp_path, monkeypatch) -> None:
    import retrofit.recovery.train as module

    real = module.hidden_states
    monkeypatch.setattr(module, "hidden_states", lambda *a, documents: real(*a, documents=True))  # no mask of ones
    with pytest.raises(UserError, match="does not cross the skips"):
        run(folders, rows, tmp_path, RECIPE.model_copy(update={"positions": "pose"}))
