"""Training a model with windows: its sinks are trained, resumed, merged and kept; and what it finds far away counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.model.families import describe
from retrofit.model.folder import ModelFolder
from retrofit.model.reexpress import reexpress
from retrofit.model.reexpress.granite_swa import NO_SINK
from retrofit.recipe.schema import Adapter
from retrofit.recovery.adapters import SINKS, attach
from retrofit.recovery.callbacks import TrainState, Watch
from retrofit.recovery.out_of_sight import hiding_window, passages, unmeasured
from retrofit.recovery.schedule import TrainRows
from retrofit.recovery.trainer import SINK_RATE, RecoveryTrainer
from retrofit.workflow.estimate.training_memory import trained_parameters
from tests.recovery.pair import RECIPE, digest, folders, rows, run  # noqa: F401
from tests.tiny import save_tiny, tiny_model

WINDOW = 16


@pytest.fixture(scope="module")
def windowed(folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:  # noqa: F811
    """(student, teacher): Llama as granite_swa, with a window and sinks in its first layer and none in the second."""
    teacher, student = folders[1], tmp_path_factory.mktemp("windowed") / "student"
    student.mkdir()
    reexpress(teacher, student, target="granite_swa")
    model = AutoModelForCausalLM.from_pretrained(student)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    model.config.sliding_window = WINDOW
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(0.5)
    model.save_pretrained(student)
    return student, teacher


def sinks_of(folder: Path) -> list[torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return [checkpoint.tensor(f"model.layers.{layer}.self_attn.sinks") for layer in range(2)]


def test_sinks_are_trained_and_those_that_stand_for_none_stay(windowed, rows, tmp_path: Path) -> None:  # noqa: F811
    report = run(windowed, rows, tmp_path, kernel="blockwise")
    first, second = sinks_of(tmp_path / "out")
    assert (first != 0.5).all()
    assert (second == NO_SINK).all()
    spec = ModelFolder(windowed[0]).spec
    assert report.trained_parameters == trained_parameters(spec, RECIPE.adapter)
    without = RECIPE.model_copy(update={"adapter": RECIPE.adapter.model_copy(update={"sinks": False})})
    run(windowed, rows, tmp_path / "without", without, kernel="blockwise")
    assert (sinks_of(tmp_path / "without/out")[0] == 0.5).all()


def test_their_gradient_is_that_of_the_eager_kernel() -> None:
    found = {}
    for kernel in ("eager", "blockwise"):
        model = tiny_model("granite_swa")
        if kernel == "blockwise":
            from retrofit.kernels.registry import apply, choose

            apply(model, choose("blockwise", describe(model.config), "cpu", training=True, dtype="float32"))
        adapted = attach(model, Adapter(rank=4), describe(model.config), seed=0)
        adapted(torch.arange(3, 60)[None]).logits.square().mean().backward()
        found[kernel] = torch.stack([layer.self_attn.sinks.grad for layer in model.model.layers])
    assert (found["eager"] != 0).all()
    torch.testing.assert_close(found["blockwise"], found["eager"], rtol=1e-4, atol=1e-6)


def test_a_killed_training_of_sinks_ends_with_the_same_bytes(windowed, rows, tmp_path, monkeypatch) -> None:  # noqa: F811
    recipe = RECIPE.model_copy(update={"weight_decay": 0.1})
    rates = []
    made = RecoveryTrainer.create_optimizer

    def watched(self, model=None):  # type: ignore[no-untyped-def]
        optimizer = made(self, model)
        rates.append([(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
        return optimizer

    monkeypatch.setattr(RecoveryTrainer, "create_optimizer", watched)
    run(windowed, rows, tmp_path / "whole", recipe, kernel="blockwise")
    assert rates[0][-1] == (2, pytest.approx(SINK_RATE * RECIPE.learning_rate), 0.0)
    assert sum(count for count, *_ in rates[0]) == 2 + 2 * 14
    step_end = Watch.on_step_end

    def die(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_step_end", die)
    with pytest.raises(KeyboardInterrupt):
        run(windowed, rows, tmp_path / "killed", recipe, kernel="blockwise")
    monkeypatch.setattr(Watch, "on_step_end", step_end)
    assert run(windowed, rows, tmp_path / "killed", recipe, kernel="blockwise").resumed_from == 4
    assert digest(tmp_path / "killed/out") == digest(tmp_path / "whole/out")


def test_a_kept_adapter_has_its_sinks_beside_it(windowed, rows, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "adapter").mkdir()
    run(windowed, rows, tmp_path, adapter=tmp_path / "adapter", kernel="blockwise")
    student = AutoModelForCausalLM.from_pretrained(windowed[0], dtype=torch.float32)
    merged = PeftModel.from_pretrained(student, tmp_path / "adapter").merge_and_unload()
    merged.load_state_dict(load_file(tmp_path / "adapter" / SINKS), strict=False)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, written[name])
    assert all(f"model.layers.{i}.self_attn.sinks" in load_file(tmp_path / "adapter" / SINKS) for i in (0, 1))


def test_second_copies_are_measured_where_a_window_hides_the_first(windowed, rows, tmp_path: Path) -> None:  # noqa: F811
    report = run(windowed, rows, tmp_path, kernel="blockwise")
    measured = [point.passage_loss for point in report.history if point.held_out_loss is not None]
    assert all(loss is not None and loss > 0 for loss in measured)
    assert report.start_passages == measured[0]
    assert report.best_passages is not None
    assert report.best_passages <= measured[0]
    assert report.cautions == ()


@pytest.mark.parametrize(("second", "kept"), [(0.9, 1), (1.1, 0)])
def test_weights_that_lose_passages_are_not_kept(second: float, kept: int) -> None:
    text, copies = iter((2.0, 1.0)), iter((1.0, second))
    watch = Watch(
        TrainState("made up"),
        weights=dict,
        held_out_loss=lambda: next(text),
        passage_loss=lambda: next(copies),
        evaluate_at=frozenset(),
        tokens_per_step=1,
        progress=None,
    )
    assert watch.measure(0) == (2.0, 1.0)
    assert watch.measure(1) == (1.0, second)
    assert watch.course.best_step == kept
    assert watch.course.best_passages == (1.0, second)[kept]


def test_rows_end_with_their_beginning_and_count_what_can_be_recognised() -> None:
    measured = TrainRows(torch.arange(4 * 64).view(4, 64), None, (64,) * 4)
    found = passages(measured, 55)
    assert found is not None
    assert found.ids_NT.shape == (2, 64)
    assert (found.ids_NT[:, -8:] == found.ids_NT[:, 1:9]).all()
    assert found.counted_NT is not None
    assert found.counted_NT[0].nonzero()[:, 0].tolist() == list(range(56, 63))
    assert passages(measured, 56) is None
    assert passages(replace(measured, cuts=(32,) * 4), 8) is None
    assert "rows of 65 tokens" in unmeasured(55) or "rows of 64 tokens" in unmeasured(55)


def test_windows_of_the_original_are_not_asked_about(tmp_path: Path) -> None:
    spec = ModelFolder(save_tiny(tmp_path / "tiny", "granite_swa")).spec
    plain = ModelFolder(save_tiny(tmp_path / "plain", "llama")).spec
    assert hiding_window(spec, plain) is not None
    assert hiding_window(spec, None) is not None
    assert hiding_window(spec, spec) is None
    assert hiding_window(plain, None) is None
