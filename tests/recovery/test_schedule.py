"""What each step reads: stages in order, the same for the same seed, at the lengths that were asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retrofit.data.packing import Packed, training_rows
from retrofit.data.samples import Teacher
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.recipe.load import validate
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.schema import Recover, TextSource
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.schedule import (
    Span,
    about,
    check_lengths,
    held_out_lines,
    recovery_rows,
    spans,
    training_lines,
)
from tests.tiny import BOS_ID, tiny_config, tiny_tokenizer

TEXT = (TextSource(source="python-docs"),)
STAGES = [{"length": 64, "tokens": 100}, {"length": 512, "tokens": 200}]
POSE = Recover(positions="pose", sequence_length=32, batch_size=2, stages=STAGES, text=TEXT, eval_tokens=128)
FULL_STAGES = [{"length": 16, "tokens": 64}, {"length": 32, "tokens": 128}]
FULL = Recover(sequence_length=32, batch_size=2, stages=FULL_STAGES, text=TEXT, eval_tokens=64)
NOBODY = Teacher(Path("nowhere"))


def packed(rows: int, length: int = 32) -> Packed:
    return Packed(torch.arange(rows * length).view(rows, length) % 200, torch.arange(length).expand(rows, -1) // 5)


def test_a_stage_has_whole_batches() -> None:
    assert POSE.tokens == 300
    assert spans(POSE, 1024) == (Span(4, 32, 64), Span(8, 32, 512))
    plain = Recover(tokens=100, sequence_length=32, batch_size=2)
    assert spans(plain, 1024) == (Span(4, 32, 32),)
    assert spans(plain.model_copy(update={"positions": "pose"}), 1024) == (Span(4, 32, 1024),)


def test_skips_of_a_stage_reach_its_length_and_not_beyond() -> None:
    lines = training_lines(packed(12), POSE, 1024, seed=3)
    positions_NT = lines.positions_NT
    assert positions_NT is not None
    assert set(lines.cuts) == {32}
    assert positions_NT[:4].max() < 64 <= positions_NT[4:].max() < 512
    ordinary = (positions_NT == torch.arange(32)).all(1)
    assert int(ordinary[:4].sum()) == 1
    assert int(ordinary[4:].sum()) == 3  # 0.35 of 4 and of 8
    again, other = (training_lines(packed(12), POSE, 1024, seed).positions_NT for seed in (3, 4))
    assert torch.equal(positions_NT, again)
    assert not torch.equal(positions_NT, other)
    held_out = held_out_lines(packed(8), POSE, 1024, seed=3).positions_NT
    assert held_out is not None
    assert 64 <= held_out.max() < 512
    assert int((held_out == torch.arange(32)).all(1).sum()) == 3


def test_rows_of_short_stages_are_several_texts() -> None:
    train, held_out = recovery_rows(FULL, tiny_tokenizer(), 0, teacher=NOBODY)
    assert held_out is not None
    assert held_out.ids_NT.shape == (2, 32)
    lines = training_lines(train, FULL, 512, seed=0)
    assert train.ids_NT.shape == (6, 32)
    assert lines.positions_NT is None
    assert lines.cuts == (16, 16, 32, 32, 32, 32)
    dataset = MicroBatches(lines, 2, every_token=True)
    first, last = (dataset[step]["input_ids"] for step in (0, 2))
    assert first.shape == (4, 16)
    assert last.shape == (2, 32)
    assert (first[:, 0] == BOS_ID).all()
    assert (last[:, 0] == BOS_ID).all()
    assert torch.equal(first, training_rows(TEXT, tiny_tokenizer(), 64, 16, 0).ids_NT)
    assert lines.skipping()[0].shape == (4, 32)


def test_positions_start_again_with_each_document() -> None:
    recipe = FULL.model_copy(update={"document_masking": True})
    lines = training_lines(packed(6), recipe, 512, seed=0)
    assert lines.positions_NT is not None
    five = [0, 1, 2, 3, 4]
    # Documents of 5 tokens, in two texts of 16.
    assert lines.positions_NT[0].tolist() == [*five, *five, *five, 0, 0, 1, 2, 3, *five, *five, 0, 1]
    assert lines.positions_NT[-1].tolist() == [i % 5 for i in range(32)]
    batch = MicroBatches(lines, 2, every_token=True)[0]
    assert batch["position_ids"].shape == batch["input_ids"].shape == (4, 16)


def test_packing_knows_where_documents_begin() -> None:
    rows = training_rows(TEXT, tiny_tokenizer(), 4096, 128, 0)
    assert rows.ids_NT.shape == rows.documents_NT.shape == (32, 128)
    begins_NT = rows.documents_NT.diff() != 0
    assert begins_NT.any()
    # A document that begins after one that ended carries its own BOS.
    bos_NT = rows.ids_NT[:, 1:] == BOS_ID
    assert (begins_NT | ~bos_NT)[:, 1:].all()


@pytest.mark.parametrize(
    ("over", "native", "claimed", "what"),
    [
        ({}, 512, 256, "a stage reaches 512"),
        ({"stages": ()}, 32, 32, "nothing to skip"),
        ({}, 16, 512, "reads 16 tokens"),
    ],
)
def test_lengths_that_do_not_fit_the_model(over, native: int, claimed: int, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        check_lengths(POSE.model_copy(update=over), native, claimed)
    assert error.value.fix
    check_lengths(POSE, 32, 512)
    check_lengths(POSE.model_copy(update={"loss": "lm"}), 16, 512)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"stages": [{"length": 512, "tokens": 9}]}, "give it the longest stage's"),
        ({"stages": [{"length": 768, "tokens": 9}]}, "divide `sequence_length`"),
        ({"stages": [{"length": 512, "sequence_length": 1024, "tokens": 9}]}, "do not reach a `length` of 512"),
        ({"stages": [{"short_length": 768, "tokens": 9}]}, "no divisor of rows"),
        ({"stages": [{"short_length": 64, "positions": "pose", "tokens": 9}]}, "is for `positions: full`"),
        ({"stages": [{"positions": "pose", "tokens": 9}], "document_masking": True}, "read as one text"),
        ({"stages": [{"length": 1024, "tokens": 9}], "tokens": 8}, "the stages' sum is 9"),
        ({"stages": [{"length": 1024, "tokens": 9}], "positions": "pose"}, "nothing to skip"),
        ({"positions": "pose", "document_masking": True}, "read as one text"),
        ({"positions": "pose", "sequence_length": 16, "pose_chunks": 17}, "more than `sequence_length`"),
        ({"positions": "pose", "pose_chunks": 1}, "at least 2"),
        ({"short_share": 1.0}, "less than 1"),
        ({"stages": [{"length": 1024}]}, "is required"),
        ({"stages": [{"length": 1024, "tokens": 9, "loss": "kl"}]}, "one of distill, lm"),
    ],
)
def test_schedules_that_contradict_themselves(values, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        validate(values, Recover, "options")


def test_what_people_are_told() -> None:
    gemma = describe(tiny_config("gemma3_text"))
    told = about(POSE, 1024, gemma)
    assert "reach 64, then 512 positions; 35%" in told[0]
    assert "sliding-window" in told[1]
    assert about(Recover(), 1024, gemma) == ()


MIXED_STAGES = [
    {"tokens": 256, "sequence_length": 32, "positions": "pose"},
    {"tokens": 512, "sequence_length": 128, "loss": "lm", "short_length": 16},
]
MIXED = Recover(sequence_length=128, short_share=0.25, stages=MIXED_STAGES, text=TEXT, eval_tokens=512)


def test_short_rows_with_skips_then_whole_ones_with_short_texts_between() -> None:
    every = spans(MIXED, 256, seed=1)
    assert every[0] == Span(2, 32, 256)
    long, short = Span(0, 128, 128, learned=True), Span(0, 16, 16)
    assert {replace(span, rows=0) for span in every[1:]} == {long, short}
    assert sum(span.rows for span in every if span.cut == 128) == 3
    assert sum(span.rows for span in every if span.cut == 16) == 1
    order = {tuple(span.cut for span in spans(MIXED, 256, seed)) for seed in range(8)}
    assert len(order) > 1


def test_rows_of_every_kind_are_laid_out_in_one_table() -> None:
    train, held_out = recovery_rows(MIXED, tiny_tokenizer(), 1, teacher=NOBODY)
    assert held_out is not None
    lines = training_lines(train, MIXED, 256, seed=1)
    assert lines.ids_NT.shape == (6, 128)
    assert sorted(lines.cuts) == [16, 32, 32, 128, 128, 128]
    assert lines.cuts[:2] == (32, 32)
    assert [learned for cut, learned in zip(lines.cuts, lines.learned, strict=True) if cut == 128] == [True] * 3
    assert sum(lines.learned) == 3
    ids, positions = lines.skipping()
    assert ids.shape == (8, 32)
    assert positions is not None
    assert 32 < positions.max() < 256
    whole = lines.cuts.index(128)
    assert lines.positions_of([whole]) is None
    # Every text begins with BOS.
    for row, cut in enumerate(lines.cuts):
        assert (lines.ids_NT[row].view(-1, cut)[:, 0] == BOS_ID).all()
    measured = held_out_lines(held_out, MIXED, 256, seed=1)
    assert set(measured.cuts) == {32}
    assert measured.positions_NT is not None


def test_counts_of_a_schedule_that_follows_and_learns() -> None:
    """A row that is learned does not count the last token of its text: nothing says what follows."""
    train, _ = recovery_rows(MIXED, tiny_tokenizer(), 1, teacher=NOBODY)
    lines = training_lines(train, MIXED, 256, seed=1)
    batches = MicroBatches(lines, 1, every_token=True)
    items = [batches[index] for index in range(6)]
    assert [item["tokens"] for item in items] == [127 if learned else 128 for learned in lines.learned]
    assert [item["learned"] for item in items] == list(lines.learned)
    assert [("next_ids" in item) for item in items] == list(lines.learned)
    assert [("position_ids" in item) for item in items] == [cut == 32 for cut in lines.cuts]


@pytest.mark.parametrize(
    ("stages", "native", "what"),
    [
        ([{"tokens": 9, "sequence_length": 128}], 64, "reads 64 tokens; of rows of 128"),
        ([{"tokens": 9, "sequence_length": 128, "loss": "lm", "short_length": 64}], 32, "of rows of 64"),
        ([{"tokens": 9, "sequence_length": 128, "positions": "pose", "length": 512}], 64, "of rows of 128"),
    ],
)
def test_the_original_teaches_no_row_longer_than_its_window(stages, native: int, what: str) -> None:
    recipe = Recover(sequence_length=128, stages=stages)
    with pytest.raises(UserError, match=what):
        check_lengths(recipe, native, 512)
    check_lengths(recipe, 128, 512)
    check_lengths(recipe.model_copy(update={"loss": "lm", "stages": ()}), native, 512)


def test_who_teaches_what_is_noted() -> None:
    llama = describe(tiny_config("llama"))
    notes = about(MIXED, 256, llama)
    assert any("rows of 32, then 128 tokens, as many tokens a step" in note for note in notes)
    assert any("25% of the steps on whole rows read texts of 16 tokens" in note for note in notes)
    assert any("rows of 128 tokens are learned from the text, the others from the original" in note for note in notes)
