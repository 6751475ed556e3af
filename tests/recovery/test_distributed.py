"""A training on several processes is that of one: the same losses, weights and checkpoints, whoever reads which row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.data.packing import Packed, training_rows
from retrofit.model.folder import opened
from retrofit.recipe.schema import Adapter, Recover, TextSource
from retrofit.recovery.callbacks import Watch
from retrofit.recovery.layout import layout_of
from retrofit.recovery.train import RecoverReport, recover
from retrofit.system.world import ALONE, World
from tests.ranks import on_ranks
from tests.tiny import save_tiny, tiny_tokenizer

ROWS, LENGTH = 10, 24
RECIPE = Recover(
    tokens=ROWS * LENGTH,
    sequence_length=LENGTH,
    batch_size=4,  # steps of 4, 4 and 2 rows
    learning_rate=1e-2,
    row_chunk=16,
    evals=3,
    checkpoints=3,
    warmup_ratio=0.0,
    adapter=Adapter(rank=4, alpha=8),
)
Pair = tuple[Path, Path]
Rows = tuple[Packed, Packed | None]


class Killed(BaseException):
    """What a killed process does not say."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(student, teacher): the student is the teacher with fewer tensors of its own."""
    root = tmp_path_factory.mktemp("pair")
    teacher = save_tiny(root / "teacher", "llama", num_key_value_heads=2)
    student = save_tiny(root / "student", "llama", num_key_value_heads=2)
    model = AutoModelForCausalLM.from_pretrained(student)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.v_proj.weight
            weight.add_(0.5 * weight.std() * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(student)
    return student, teacher


@pytest.fixture(scope="module")
def rows() -> Rows:
    source, tokenizer = (TextSource(source="python-docs"),), tiny_tokenizer()
    train = training_rows(source, tokenizer, RECIPE.tokens, LENGTH, 0)
    return train, training_rows(source, tokenizer, 3 * LENGTH, LENGTH, 0, "held_out")


def train(
    world: World, folders: Pair, rows: Rows, root: Path, recipe: Recover, over: dict[str, Any] | None = None
) -> RecoverReport:
    """What one process does. over: `kill_at`, a step in which the last process dies; `fits`; arguments of `recover`."""
    options = dict(over or {})
    kill_at, fits = options.pop("kill_at", None), options.pop("fits", True)
    if kill_at is not None and world.rank == world.size - 1:
        step_end = Watch.on_step_end

        def die(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            step_end(self, args, state, control, **kwargs)
            if state.global_step == kill_at:
                raise Killed

        Watch.on_step_end = die  # type: ignore[method-assign]
    student, teacher = folders
    out = root / "out"
    out.mkdir(parents=True, exist_ok=True)
    layout = layout_of(recipe, world, opened(student).spec, "cpu", fits=fits)
    return recover(
        student,
        teacher if recipe.loss == "distill" else None,
        out,
        recipe,
        *rows,
        **{"dtype": "float32", "kernel": "sdpa", "work_dir": root / "work", "seed": 3, **options},
        world=world,
        layout=layout,
    )


def alone(folders: Pair, rows: Rows, root: Path, recipe: Recover = RECIPE, **over: Any) -> RecoverReport:
    return train(ALONE, folders, rows, root, recipe, over)


def require_same(ours: RecoverReport, theirs: RecoverReport, rel: float = 1e-5) -> None:
    """The same losses at every step, and the same step kept."""
    assert [point.step for point in ours.history] == [point.step for point in theirs.history]
    for point, other in zip(ours.history, theirs.history, strict=True):
        assert point.loss == (None if other.loss is None else pytest.approx(other.loss, rel=rel))
        assert point.held_out_loss == (
            None if other.held_out_loss is None else pytest.approx(other.held_out_loss, rel=rel)
        )
    assert ours.best_step == theirs.best_step


def require_same_weights(ours: Path, theirs: Path) -> None:
    """The written checkpoints agree."""
    one, other = Checkpoint.open(ours / "out"), Checkpoint.open(theirs / "out")
    assert one.names == other.names
    for name in one.names:
        torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "loss"), [(2, "distill"), (3, "distill"), (3, "lm")])
def test_losses_and_weights_are_those_of_one_process(folders, rows, tmp_path, size, loss) -> None:
    recipe = RECIPE.model_copy(update={"loss": loss})
    one = alone(folders, rows, tmp_path / "one", recipe)
    several = on_ranks(tmp_path, size, train, folders, rows, tmp_path / "several", recipe)
    for report in several:
        require_same(report, one)
    assert one.best_loss < one.start_loss
    require_same_weights(tmp_path / "several", tmp_path / "one")


@pytest.mark.parametrize(("began", "ended"), [(2, 1), (1, 3)])
def test_a_training_goes_on_with_another_number_of_processes(folders, rows, tmp_path, began, ended) -> None:
    one = alone(folders, rows, tmp_path / "one")
    root = tmp_path / "several"
    killed = (folders, rows, root, RECIPE, {"kill_at": 2})
    if began == 1:
        with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Watch, "on_step_end", Watch.on_step_end)
            train(ALONE, *killed)
    else:
        with pytest.raises(AssertionError, match="Killed"):
            on_ranks(tmp_path, began, train, *killed)
    [report, *_] = (
        on_ranks(tmp_path, ended, train, folders, rows, root, RECIPE) if ended > 1 else [alone(folders, rows, root)]
    )
    assert report.resumed_from == 1
    require_same(report, one)
    require_same_weights(root, tmp_path / "one")
