"""A training on several processes is that of one: the same losses, weights and checkpoints, whoever reads which row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.checkpoint.read import Checkpoint
from retrofit.data.packing import Packed, training_rows
from retrofit.model.folder import opened
from retrofit.recipe.schema import Adapter, Distribute, Recover, Stage, TextSource
from retrofit.recovery import layout
from retrofit.recovery.callbacks import Watch
from retrofit.recovery.layout import layout_of
from retrofit.recovery.report import RecoverReport
from retrofit.recovery.train import recover
from retrofit.system.world import ALONE, World
from tests.ranks import on_ranks
from tests.recovery.pair import pair_in
from tests.recovery.torch_context_parallel import on_cpu
from tests.tiny import save_tiny, tiny_tokenizer

ROWS, LENGTH = 10, 32
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
MIXED = (Stage(tokens=4 * LENGTH, loss="lm"), Stage(tokens=6 * LENGTH, sequence_length=16, positions="pose"))
Pair = tuple[Path, Path]
Rows = tuple[Packed, Packed | None]


class Killed(BaseException):
    """What a killed process does not say."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(student, teacher): the student is the teacher with other values in its attention."""
    return pair_in(tmp_path_factory.mktemp("pair"), num_key_value_heads=2)


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
    places = layout_of(recipe, world, opened(student).spec, "cpu", fits=fits)
    return recover(
        student,
        teacher if recipe.loss == "distill" else None,
        out,
        recipe,
        *rows,
        **{"dtype": "float32", "kernel": "sdpa", "work_dir": root / "work", "seed": 3, **options},
        world=world,
        layout=places,
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


@pytest.mark.parametrize(
    ("size", "over"), [(2, {}), (3, {}), (3, {"loss": "lm"}), (3, {"stages": MIXED, "token_weights": "long"})]
)
def test_losses_and_weights_are_those_of_one_process(folders, rows, tmp_path, size, over) -> None:
    recipe = RECIPE.model_copy(update=over)
    one = alone(folders, rows, tmp_path / "one", recipe)
    several = on_ranks(tmp_path, size, train, folders, rows, tmp_path / "several", recipe)
    for report in several:
        require_same(report, one)
    assert one.best_loss < one.start_loss
    require_same_weights(tmp_path / "several", tmp_path / "one")


def masked(packed: Packed) -> Packed:
    """Some tokens of every row count, another number in each."""
    generator = torch.Generator().manual_seed(1)
    share_N1 = torch.linspace(0.1, 0.8, len(packed.ids_NT))[:, None]
    counted_NT = torch.rand(packed.ids_NT.shape, generator=generator) < share_N1
    counted_NT[:, 0], counted_NT[:, -1] = True, False
    return replace(packed, counted_NT=counted_NT)


@pytest.mark.parametrize("over", [{"loss": "lm"}, {"distribute": Distribute(sequence=2)}])
def test_rows_of_which_some_tokens_count(folders, rows, tmp_path, over) -> None:
    """As the assistant's of dialogues do: the sum over all processes by the number of all that count."""
    recipe = RECIPE.model_copy(update=over)
    marked = tuple(masked(one) for one in rows)
    one = alone(folders, marked, tmp_path / "one", recipe.model_copy(update={"distribute": Distribute()}))
    reports = on_ranks(tmp_path, 2, train, folders, marked, tmp_path / "several", recipe, {"kernel": "auto"})
    require_same(reports[0], one)
    require_same_weights(tmp_path / "several", tmp_path / "one")


SPLIT = RECIPE.model_copy(update={"distribute": Distribute(shard=2)})


def test_steps_of_different_numbers_of_tokens(folders, rows, tmp_path) -> None:
    """Rows of a first stage are two texts each, whose last tokens predict nothing."""
    stages = (Stage(length=LENGTH // 2, tokens=4 * LENGTH), Stage(length=LENGTH, tokens=6 * LENGTH))
    recipe = RECIPE.model_copy(update={"loss": "lm", "stages": stages})
    one = alone(folders, rows, tmp_path / "one", recipe)
    [report, *_] = on_ranks(tmp_path, 3, train, folders, rows, tmp_path / "several", recipe)
    require_same(report, one)


@pytest.mark.parametrize(("began", "ended", "recipe"), [(2, 1, RECIPE), (1, 3, RECIPE), (1, 2, SPLIT), (2, 1, SPLIT)])
def test_a_training_goes_on_with_another_number_of_processes(folders, rows, tmp_path, began, ended, recipe) -> None:
    """And with the weights split or whole."""
    one = alone(folders, rows, tmp_path / "one")
    root = tmp_path / "several"
    killed = (folders, rows, root, recipe if began > 1 else RECIPE, {"kill_at": 2})
    if began == 1:
        with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Watch, "on_step_end", Watch.on_step_end)
            train(ALONE, *killed)
    else:
        with pytest.raises(AssertionError, match="Killed"):
            on_ranks(tmp_path, began, train, *killed)
    [report, *_] = (
        on_ranks(tmp_path, ended, train, folders, rows, root, recipe) if ended > 1 else [alone(folders, rows, root)]
    )
    assert report.resumed_from == 1
    require_same(report, one)
    require_same_weights(root, tmp_path / "one")


@pytest.mark.parametrize(
    "over",
    [
        {},
        {
            "loss": "lm",
            "gradient_checkpointing": True,
            "adapter": Adapter(rank=4, alpha=8, norms=True, embeddings=True),
        },
    ],
)
def test_weights_split_over_processes_train_as_whole_ones(folders, rows, tmp_path, over) -> None:
    recipe = SPLIT.model_copy(update=over)
    one = alone(folders, rows, tmp_path / "one", RECIPE.model_copy(update=over))
    [report, _] = on_ranks(tmp_path, 2, train, folders, rows, tmp_path / "several", recipe)
    require_same(report, one)
    require_same_weights(tmp_path / "several", tmp_path / "one")
    assert any("split" in note for note in report.notes)


SHARED = RECIPE.model_copy(update={"distribute": Distribute(sequence=2)})


@pytest.mark.parametrize(
    ("size", "over"),
    [
        (2, {}),
        (2, {"loss": "lm", "gradient_checkpointing": True, "sequence_length": 31}),
        (4, {"distribute": Distribute(shard=2, sequence=2), "positions": "pose"}),
    ],
)
def test_rows_shared_by_processes_train_as_whole_ones(folders, rows, tmp_path, size, over) -> None:
    """With lengths that do not divide, positions that skip, and the weights split as well."""
    recipe = SHARED.model_copy(update=over)
    packed = tuple(
        Packed(one.ids_NT[:, : recipe.sequence_length], one.documents_NT[:, : recipe.sequence_length]) for one in rows
    )
    one = alone(folders, packed, tmp_path / "one", recipe.model_copy(update={"distribute": Distribute()}))
    [report, *_] = on_ranks(tmp_path, size, train, folders, packed, tmp_path / "several", recipe, {"kernel": "auto"})
    require_same(report, one)
    require_same_weights(tmp_path / "several", tmp_path / "one")
    assert report.kernel == "ring"
    assert any("share every row (ring" in note for note in report.notes)


def with_torch(world: World, *values: Any) -> RecoverReport:
    """`train` with torch's context parallelism, whose ring gets PyTorch's flash op for CPUs here."""
    on_cpu()
    layout._torch_objection = lambda *_: None  # type: ignore[assignment]
    return train(world, *values)


def test_rows_shared_by_torchs_context_parallelism_train_as_whole_ones(folders, rows, tmp_path) -> None:
    recipe = SHARED.model_copy(update={"sequence_engine": "torch"})
    one = alone(folders, rows, tmp_path / "one")
    [report, _] = on_ranks(tmp_path, 2, with_torch, folders, rows, tmp_path / "several", recipe)
    require_same(report, one)
    require_same_weights(tmp_path / "several", tmp_path / "one")
    assert report.kernel == "sdpa"
    assert any("share every row (torch" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["distill", "lm"])
def test_rows_of_16k_tokens_shared_by_two_processes_train_as_whole_ones(tmp_path, loss) -> None:
    tokens = 16_384
    teacher = save_tiny(tmp_path / "teacher", "llama", num_key_value_heads=2, max_position_embeddings=tokens)
    student = save_tiny(tmp_path / "student", "llama", num_key_value_heads=2, max_position_embeddings=tokens, seed=1)
    texts = (TextSource(source="python-docs"),)
    packed = (training_rows(texts, tiny_tokenizer(), 3 * tokens, tokens, 0), None)
    recipe = SHARED.model_copy(
        update={"loss": loss, "tokens": 3 * tokens, "sequence_length": tokens, "batch_size": 1, "row_chunk": 512}
    )
    one = alone((student, teacher), packed, tmp_path / "one", recipe.model_copy(update={"distribute": Distribute()}))
    places = (tmp_path, 2, train, (student, teacher), packed, tmp_path / "several", recipe, {"kernel": "auto"})
    [report, _] = on_ranks(*places, seconds=600)
    require_same(report, one)
