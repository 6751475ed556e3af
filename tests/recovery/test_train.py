"""Training ends better than it started, survives a kill with the same bytes, and fails with a clear error."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from retrofit.checkpoint.read import Checkpoint
from retrofit.console import Silent
from retrofit.data.packing import Packed, training_rows
from retrofit.errors import UserError
from retrofit.recipe.schema import Adapter, Recover, Stage, TextSource
from retrofit.recovery import train
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.callbacks import DivergedError, TrainState, Watch
from retrofit.recovery.report import RecoverReport
from retrofit.recovery.schedule import TrainRows, training_lines
from retrofit.recovery.settings import training_arguments
from retrofit.recovery.token_weights import text_weights
from retrofit.recovery.train import recover
from tests.tiny import save_tiny, tiny_tokenizer

RECIPE = Recover(
    tokens=16 * 48,
    sequence_length=48,
    batch_size=2,
    learning_rate=1e-2,
    row_chunk=32,
    evals=2,
    checkpoints=4,
    adapter=Adapter(rank=4, alpha=8),
)


STAGES = (Stage(length=128, tokens=8 * 48), Stage(length=512, tokens=8 * 48))
MIXED = (Stage(tokens=2 * 48, loss="lm"), Stage(tokens=14 * 48, sequence_length=24, positions="pose"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher): the student is the teacher with other values in its attention."""
    root = tmp_path_factory.mktemp("pair")
    teacher = save_tiny(root / "teacher", "llama")
    student = save_tiny(root / "student", "llama")
    model = AutoModelForCausalLM.from_pretrained(student)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.v_proj.weight
            weight.add_(0.5 * weight.std() * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(student)
    return student, teacher


@pytest.fixture(scope="module")
def rows() -> tuple[Packed, Packed]:
    tokenizer = tiny_tokenizer()
    source = (TextSource(source="python-docs"),)
    train = training_rows(source, tokenizer, RECIPE.tokens, RECIPE.sequence_length, 0)
    held_out = training_rows(source, tokenizer, 96, RECIPE.sequence_length, 0, "held_out")
    return train, held_out


def run(folders, rows, root: Path, recipe: Recover = RECIPE, **over) -> RecoverReport:
    out = root / "out"
    out.mkdir(parents=True, exist_ok=True)
    student, teacher = folders
    options = {"dtype": "float32", "kernel": "sdpa", "work_dir": root / "work", **over}
    return recover(student, teacher, out, recipe, *rows, **options)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_distillation_brings_the_student_nearer_and_leaves_the_rest_alone(folders, rows, tmp_path: Path) -> None:
    report = run(folders, rows, tmp_path)
    assert report.start_loss is not None
    assert report.best_loss is not None
    assert report.best_loss < 0.8 * report.start_loss
    assert report.best_step in {4, 8}
    assert report.steps == 8
    assert report.tokens == RECIPE.tokens
    assert [point.step for point in report.history] == list(range(9))
    rates = [point.learning_rate for point in report.history[1:]]
    assert rates[0] == 0.0
    assert rates[1] == max(rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    before, after = Checkpoint.open(folders[0]), Checkpoint.open(tmp_path / "out")
    assert set(before.names) == set(after.names)
    for name in before.names:
        assert after.dtype(name) == before.dtype(name)
        assert torch.equal(before.tensor(name), after.tensor(name)) == ("proj" not in name), name


def test_the_written_checkpoint_has_the_loss_that_was_measured(folders, rows, tmp_path: Path) -> None:
    report = run(folders, rows, tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    with torch.no_grad():
        log_t, log_s = (model(rows[1].ids_NT).logits.log_softmax(-1) for model in (teacher, student))
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert report.best_loss == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_other_divergences_bring_the_student_nearer(folders, rows, tmp_path, divergence) -> None:
    report = run(folders, rows, tmp_path, RECIPE.model_copy(update={"divergence": divergence}))
    assert report.start_loss is not None
    assert report.best_loss is not None
    assert report.best_loss < 0.8 * report.start_loss


def test_without_a_learning_rate_it_follows_from_the_width(folders, rows, tmp_path) -> None:
    recipe = RECIPE.model_copy(update={"learning_rate": None, "warmup_ratio": 0.0})
    report = run(folders, rows, tmp_path, recipe)
    width = AutoModelForCausalLM.from_pretrained(folders[0]).config.hidden_size
    assert report.history[1].learning_rate == pytest.approx(0.576 / width)
    assert any(f"width of {width}" in note for note in report.notes)


def test_more_gpus_than_one_do_not_split_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_gpus(arguments: TrainingArguments) -> torch.device:
        arguments._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    batches = MicroBatches(TrainRows(torch.zeros(16, 48, dtype=torch.long), None, (48,) * 16), 2, every_token=True)
    arguments = training_arguments(RECIPE, tmp_path, batches, "cuda", 0)
    assert arguments._n_gpu == 1
    assert arguments.train_batch_size == RECIPE.batch_size
    assert arguments.max_steps == 8


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


@pytest.mark.parametrize(
    ("killed_at", "positions"), [(3, "full"), (5, "full"), (8, "full"), (5, "pose"), (5, "mixed"), (5, "long")]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    folders, rows, tmp_path, monkeypatch, killed_at, positions
) -> None:
    recipe = RECIPE.model_copy(update={"adapter": Adapter(rank=4, alpha=8, dropout=0.1)})
    if positions == "pose":
        recipe = recipe.model_copy(update={"positions": "pose", "stages": STAGES})
    if positions in ("mixed", "long"):
        recipe = recipe.model_copy(update={"stages": MIXED, "token_weights": "long" if positions == "long" else "even"})
    whole = run(folders, rows, tmp_path / "whole", recipe)

    class Killed(BaseException):
        pass

    step_end = Watch.on_step_end

    def die(self, args, state, control, **kwargs) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == killed_at:
            (Path(args.output_dir) / f"checkpoint-{killed_at}").mkdir()  # half a checkpoint
            raise Killed

    monkeypatch.setattr(Watch, "on_step_end", die)
    with pytest.raises(Killed):
        run(folders, rows, tmp_path / "killed", recipe)
    monkeypatch.setattr(Watch, "on_step_end", step_end)
    again = run(folders, rows, tmp_path / "killed", recipe)
    assert again.resumed_from == (killed_at - 1) // 2 * 2
    assert digest(tmp_path / "killed/out") == digest(tmp_path / "whole/out")
    losses = [[(p.step, p.loss, p.held_out_loss, p.learning_rate) for p in r.history] for r in (whole, again)]
    assert losses[0] == losses[1]
    assert (whole.best_step, whole.best_loss) == (again.best_step, again.best_loss)


def test_a_finished_training_is_not_run_again_and_another_recipe_starts_anew(folders, rows, tmp_path: Path) -> None:
    first = run(folders, rows, tmp_path)
    bytes_before = digest(tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    recipe = RECIPE.model_copy(update={"allow_repeats": True, "keep_adapter": True})  # which change no weight
    again = run(folders, rows, tmp_path, recipe)
    assert again.resumed_from == again.steps
    assert again.history == first.history
    assert digest(tmp_path / "out") == bytes_before
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    other = run(folders, rows, tmp_path, RECIPE.model_copy(update={"learning_rate": 5e-3}))
    assert other.resumed_from == 0


def test_when_nothing_is_better_the_start_is_kept_byte_for_byte(folders, rows, tmp_path: Path) -> None:
    progress = Silent()
    recipe = RECIPE.model_copy(update={"learning_rate": 30.0, "max_grad_norm": 1e9, "warmup_ratio": 0.0})
    report = run((folders[1], folders[1]), rows, tmp_path, recipe, progress=progress)
    assert report.best_step == 0
    assert report.best_loss == report.start_loss
    assert any("no measurement was better" in note for note in progress.notes)
    before, after = Checkpoint.open(folders[1]), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_fix(folders, rows, tmp_path, monkeypatch) -> None:
    import retrofit.recovery.trainer as trainer

    calls = iter(range(100))
    real = trainer.distill_loss
    # Two calls measure the two held-out rows at the start.
    monkeypatch.setattr(trainer, "distill_loss", lambda *a: real(*a) * (float("nan") if next(calls) >= 4 else 1.0))
    with pytest.raises(UserError, match="step 3") as caught:
        run(folders, rows, tmp_path)
    assert "learning_rate" in str(caught.value.fix)
    assert not any((tmp_path / "out").iterdir())


LONG = RECIPE.model_copy(update={"tokens": 96 * 48, "evals": 12})


def absurd(monkeypatch: pytest.MonkeyPatch, step: int, factor: float) -> None:
    """From this step on the training's losses are so many times themselves."""
    real = Watch.on_step_end

    def worse(self, args, state, control, **kwargs) -> None:
        self.loss = self.loss * (factor if state.global_step >= step else 1.0)
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watch, "on_step_end", worse)


@pytest.fixture(scope="module")
def many(rows: tuple[Packed, Packed]) -> tuple[Packed, Packed]:
    train = training_rows((TextSource(source="python-docs"),), tiny_tokenizer(), LONG.tokens, 48, 0)
    return train, rows[1]


def test_an_absurd_rate_stops_at_once_with_the_fix(folders, many, tmp_path: Path) -> None:
    recipe = LONG.model_copy(update={"learning_rate": 1.0, "max_grad_norm": 1e9, "warmup_ratio": 0.0})
    with pytest.raises(UserError, match=r"steps up to (9|1\d) is .* at the start") as caught:
        run(folders, many, tmp_path, recipe)
    assert "try a third" in str(caught.value.fix)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("factor", "last"), [(float("inf"), 30), (100.0, 31)])
def test_a_training_that_diverges_later_keeps_its_best_weights(
    folders, many, tmp_path, monkeypatch, factor, last
) -> None:
    absurd(monkeypatch, 30, factor)
    report = run(folders, many, tmp_path, LONG)
    assert report.best_step in {4, 8, 12, 16, 20, 24, 28}
    assert report.best_loss < 0.8 * report.start_loss
    assert report.history[-1].step <= last
    assert report.tokens == report.history[-1].step * 2 * 48
    assert any(
        note.startswith("stopped early: ") and f"step {report.best_step} are kept" in note for note in report.notes
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    with torch.no_grad():
        log_t, log_s = (model(many[1].ids_NT).logits.log_softmax(-1) for model in (teacher, student))
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert report.best_loss == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.parametrize("loss", ["distill", "lm"])
def test_rows_computed_one_at_a_time_and_losses_read_in_groups_give_the_same_training(
    folders, rows, tmp_path, monkeypatch, loss
) -> None:
    recipe = RECIPE.model_copy(update={"loss": loss, "tokens": 15 * 48})  # the last step has one row
    text = replace(rows[0], ids_NT=rows[0].ids_NT[:15])
    whole = run(folders, (text, rows[1]), tmp_path / "whole", recipe)
    monkeypatch.setattr(train, "micro_batch", lambda rows, attempt, device: attempt(1) or 1)
    monkeypatch.setattr(train, "steps_between_readings", lambda device: 3)
    parts = run(folders, (text, rows[1]), tmp_path / "parts", recipe)
    assert any("1 of the 2 rows" in note for note in parts.notes)
    assert [point.step for point in parts.history] == [point.step for point in whole.history]
    for ours, theirs in zip(parts.history[1:], whole.history[1:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert (ours.held_out_loss is None) == (theirs.held_out_loss is None)
    assert parts.best_loss == pytest.approx(whole.best_loss, rel=1e-4)


def test_language_model_loss_without_held_out_text_keeps_the_last_weights(folders, rows, tmp_path: Path) -> None:
    progress = Silent()
    recipe = RECIPE.model_copy(update={"loss": "lm", "gradient_checkpointing": True})
    report = run((folders[0], None), (rows[0], None), tmp_path, recipe, progress=progress)
    losses = [point.loss for point in report.history if point.loss is not None]
    assert report.best_step == report.steps
    assert losses[-1] < losses[0]
    assert any("nothing is held out" in note for note in progress.notes)


def test_distillation_needs_a_teacher_of_the_same_vocabulary(folders, rows, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the original model"):
        run((folders[0], None), rows, tmp_path)
    other = save_tiny(tmp_path / "other", "llama", vocab_size=300)
    with pytest.raises(UserError, match="vocabulary"):
        run((folders[0], other), rows, tmp_path)


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


def test_a_kept_adapter_merged_by_peft_is_what_was_written(folders, rows, tmp_path: Path) -> None:
    """Also with modules that are trained in full; its files name no path of this machine."""
    from peft import PeftModel

    recipe = RECIPE.model_copy(update={"adapter": Adapter(rank=4, alpha=8, norms=True)})
    (tmp_path / "adapter").mkdir()
    run(folders, rows, tmp_path, recipe, adapter=tmp_path / "adapter")
    student = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    merged = PeftModel.from_pretrained(student, tmp_path / "adapter").merge_and_unload().state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert merged.keys() == written.keys()
    for name, value in written.items():
        torch.testing.assert_close(merged[name], value)
    assert any(not torch.equal(before[name], value) for name, value in written.items())
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert str(folders[0]) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_losses_are_logged_where_the_recipe_says_and_change_no_byte(folders, rows, tmp_path: Path, monkeypatch) -> None:
    logged: list[tuple[str, str, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            logged.append((self.log_dir, tag, step))

        def add_text(self, *_: object) -> None: ...

        flush = close = add_text

    module = ModuleType("tensorboardX")
    module.__spec__ = ModuleSpec("tensorboardX", None)
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(folders, rows, tmp_path / "a")
    assert logged == []
    recipe = RECIPE.model_copy(update={"report_to": ("tensorboard",)})
    run(folders, rows, tmp_path / "b", recipe, logs=tmp_path / "logs")
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "b" / "out")
    assert {folder for folder, _, _ in logged} == {str(tmp_path / "logs")}
    assert [step for _, tag, step in logged if tag == "train/loss"] == list(range(1, 9))
    assert [step for _, tag, step in logged if tag == "eval/loss"] == [0, 4, 8]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_a_stage_that_learns_from_the_text_is_compared_with_itself() -> None:
    """Distilling loses 0.05 nats a token and learning 3: that is another loss, and no divergence."""
    course = TrainState("", start_loss=0.05)
    watch = Watch(
        course,
        weights=dict,
        held_out_loss=None,
        evaluate_at=frozenset(),
        tokens_per_step=1,
        progress=None,
        learned=lambda step: step > 10,
    )

    def step(number: int, loss: float) -> None:
        watch.unread.append((number, torch.tensor(loss), 1e-3))
        watch.read()

    for number in range(1, 11):
        step(number, 0.05)
    for number in range(11, 31):
        step(number, 3.0)
    with pytest.raises(DivergedError, match=r"steps up to"):
        for number in range(31, 50):
            step(number, 30.0)
