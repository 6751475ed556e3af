"""Training on dialogues: losses and gradients are those of a plain reference, dialogue by dialogue."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from retrofit.data.packing import Packed
from retrofit.recipe.schema import Adapter, Recover, TextSource
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.callbacks import Watch
from retrofit.recovery.objectives import IGNORED
from retrofit.recovery.report import RecoverReport
from retrofit.recovery.schedule import recovery_rows, training_lines
from retrofit.recovery.student_teacher import load_student_teacher
from retrofit.recovery.train import recover, student_with_adapters
from retrofit.recovery.trainer import Objective, total_loss
from tests.dialogues import CHATML, small_talk, write_rows
from tests.tiny import save_tiny, tiny_tokenizer

LENGTH = 256
RECIPE = Recover(
    tokens=8 * LENGTH,
    sequence_length=LENGTH,
    batch_size=2,
    learning_rate=1e-2,
    row_chunk=64,
    evals=2,
    eval_tokens=LENGTH,
    checkpoints=4,
    adapter=Adapter(rank=4, alpha=8),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher) with different weights."""
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", seed=1), save_tiny(root / "teacher", seed=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Packed]:
    file = write_rows(tmp_path_factory.mktemp("text") / "chat.jsonl", small_talk(40))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    recipe = RECIPE.model_copy(update={"text": (TextSource(source=str(file)),)})
    train, held_out = recovery_rows(recipe, tokenizer, 0, teacher=None)  # type: ignore[arg-type]
    assert held_out is not None
    return train, held_out


def reference(folders: tuple[Path, Path], packed: Packed, loss: str, *, apart: bool) -> float:
    """Mean loss over the counted tokens, from whole logits. apart: each dialogue read by itself."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    assert packed.counted_NT is not None
    total, count = 0.0, 0
    for ids_T, numbers_T, counted_T in zip(packed.ids_NT, packed.documents_NT, packed.counted_NT, strict=True):
        parts = [numbers_T == number for number in numbers_T.unique()] if apart else [numbers_T > -2]
        for own in parts:
            with torch.no_grad():
                log_s, log_t = (model(ids_T[own][None]).logits[0].log_softmax(-1) for model in (student, teacher))
            if loss == "distill":
                losses = (log_t.exp() * (log_t - log_s)).sum(-1)
            else:
                losses = -log_s[:-1].gather(1, ids_T[own][1:, None])[:, 0]
            counted = counted_T[own][: len(losses)]
            total, count = total + float(losses[counted].sum()), count + int(counted.sum())
    assert count == int(packed.counted_NT.sum())
    return total / count


def run(folders: tuple[Path, Path], rows: tuple[Packed, Packed], root: Path, recipe: Recover) -> RecoverReport:
    out = root / "out"
    out.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"dtype": "float32", "kernel": "sdpa", "work_dir": root / "work"}
    return recover(*folders, out, recipe, *rows, **how)


@pytest.mark.parametrize("loss", ["distill", "lm"])
@pytest.mark.parametrize("apart", [False, True])
def test_the_loss_is_the_references_on_the_assistants_tokens(folders, rows, tmp_path, loss, apart) -> None:
    recipe = RECIPE.model_copy(update={"loss": loss, "document_masking": apart})
    report = run(folders, rows, tmp_path, recipe)
    assert report.start_loss == pytest.approx(reference(folders, rows[1], loss, apart=apart), rel=1e-5)
    assert report.best_loss is not None
    assert report.best_loss < 0.9 * report.start_loss
    assert any("the loss counts" in note for note in report.notes)


@pytest.mark.parametrize("loss", ["distill", "lm"])
def test_gradients_are_those_of_the_reference(folders, rows, loss) -> None:
    """The gradient of a step is that of the sum over its counted tokens by their number, over both its rows."""
    recipe = RECIPE.model_copy(update={"loss": loss})
    pair = load_student_teacher(
        folders[0], folders[1] if loss == "distill" else None, device="cpu", dtype=torch.float32, kernel="sdpa"
    )
    model = student_with_adapters(pair, recipe, 0)
    lines = training_lines(rows[0], recipe, LENGTH, 0)
    item = MicroBatches(lines, 2, every_token=loss == "distill")[0]
    assert rows[0].counted_NT is not None
    counted_BT = rows[0].counted_NT[:2]
    assert item["tokens"] == int(counted_BT.sum())
    assert torch.equal(item["next_ids"] != IGNORED, counted_BT)
    given = {"input_ids": item["input_ids"]}
    (total_loss(Objective(pair, recipe), model, given, item["next_ids"], torch.float32) / item["tokens"]).backward()
    ours = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()

    def logits(head: Tensor, hidden: Tensor) -> Tensor:
        return (hidden @ head.T).log_softmax(-1)

    ids_BT = item["input_ids"]
    log_s = logits(pair.student.lm_head.weight, model(ids_BT))
    if pair.teacher is not None:
        with torch.no_grad():
            log_t = pair.teacher(ids_BT).logits.log_softmax(-1)
        losses_BT = (log_t.exp() * (log_t - log_s)).sum(-1)
    else:
        losses_BT = -log_s[:, :-1].gather(2, ids_BT[:, 1:, None])[..., 0]
        counted_BT = counted_BT[:, :-1]
    losses_BT[counted_BT].mean().backward()
    theirs = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7)


def test_a_killed_run_ends_with_the_same_bytes(folders, rows, tmp_path, monkeypatch) -> None:
    recipe = RECIPE.model_copy(update={"document_masking": True})
    run(folders, rows, tmp_path / "whole", recipe)
    end = Watch.on_step_end

    def killed(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 3:
            raise KeyboardInterrupt
        return end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folders, rows, tmp_path / "killed", recipe)
    report = run(folders, rows, tmp_path / "killed", recipe)
    assert report.resumed_from == 2
    whole, resumed = (
        hashlib.sha256((tmp_path / name / "out" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "killed")
    )
    assert resumed == whole


def test_another_mask_is_another_training(folders, rows, tmp_path) -> None:
    run(folders, rows, tmp_path, RECIPE)
    everything = tuple(Packed(one.ids_NT, one.documents_NT) for one in rows)
    assert run(folders, everything, tmp_path, RECIPE).resumed_from == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("every_token", [True, False])
def test_a_process_without_a_row_counts_nothing_and_steps_count_once(rows, every_token) -> None:
    lines = training_lines(rows[0], RECIPE, LENGTH, 0)
    items = [MicroBatches(lines, 2, every_token=every_token, rank=rank, ranks=3)[0] for rank in range(3)]
    counted = [int((item["next_ids"] != IGNORED).sum()) for item in items]
    assert counted[2] == 0
    assert {sum(counted)} == {item["tokens"] for item in items}
