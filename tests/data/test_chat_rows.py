"""Rows of dialogues: whole, filled, and with a mask of what counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.context.positions import document_positions
from retrofit.data.chat_tokens import chat_tokens
from retrofit.data.packing import Packed, training_rows
from retrofit.data.texts import read_texts
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from tests.dialogues import CHATML, says, small_talk, write_rows
from tests.tiny import EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = CHATML


def source(tmp_path: Path, rows: list[Any], **how: Any) -> TextSource:
    return TextSource(source=str(write_rows(tmp_path / "a.jsonl", rows)), **how)


def packed(given: TextSource, tokens: int = 3200, length: int = 320, **how: Any) -> Packed:
    return training_rows([given], TOKENIZER, tokens, length, 0, **{"split": "all", "loss_on": "assistant", **how})


def documents(rows: Packed) -> list[tuple[list[int], list[bool]]]:
    """Tokens and counted marks of every document but the padding."""
    assert rows.counted_NT is not None
    found = []
    for ids_T, numbers_T, counted_T in zip(rows.ids_NT, rows.documents_NT, rows.counted_NT, strict=True):
        for number in dict.fromkeys(numbers_T.tolist()):
            if number >= 0:
                own = numbers_T == number
                found.append((ids_T[own].tolist(), counted_T[own].tolist()))
    return found


def test_dialogues_stay_whole_and_count_what_the_assistant_says(tmp_path: Path) -> None:
    given = source(tmp_path, small_talk(30))
    every = {one.ids: one for one in chat_tokens(read_texts(given, split="all"), TOKENIZER)}
    rows = packed(given)
    assert rows.ids_NT.shape == (10, 320)
    for ids, counted in documents(rows):
        assert counted == [*every[tuple(ids)].scored[1:], False]
    padding = rows.documents_NT == -1
    assert bool((rows.ids_NT[padding] == EOS_ID).all())
    assert rows.counted_NT is not None
    assert not bool(rows.counted_NT[padding].any())
    assert float(padding.float().mean()) < 0.15
    assert "a.jsonl`: 30 dialogues of" in rows.read[0]


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    given = source(tmp_path, small_talk(30))
    assert torch.equal(packed(given).ids_NT, packed(given).ids_NT)


def test_few_dialogues_are_read_again_and_a_note_says_how_often(tmp_path: Path) -> None:
    rows = packed(source(tmp_path, small_talk(3)))
    assert bool((rows.documents_NT >= 0).any(1).all())
    times = len(documents(rows)) / 3
    assert f"read {times:.1f} times" in rows.read[0]


def test_a_long_dialogue_is_cut_after_a_turn_or_left_out(tmp_path: Path) -> None:
    cut, left = says("a", "b" * 20, "c", "d" * 400), says("e" * 400, "f")
    rows = packed(source(tmp_path, [cut, left, says("g", "h")]), length=160)
    assert any(TOKENIZER.decode(ids).endswith("b<|im_end|>") for ids, _ in documents(rows))
    assert rows.notes[0] == "`a.jsonl`: longer than 160 tokens, cut after a turn of the assistant: 1 dialogue"
    assert rows.notes[1] == "`a.jsonl`: left out, as no turn of the assistant ends within 160 tokens: 1 dialogue"
    with pytest.raises(UserError, match="no dialogue has a turn of the assistant that ends within 160 tokens"):
        packed(source(tmp_path, [left]), length=160)


def test_the_loss_on_all_counts_all_but_the_end_of_a_dialogue(tmp_path: Path) -> None:
    for ids, counted in documents(packed(source(tmp_path, small_talk(9)), loss_on="all")):
        assert counted == [True] * (len(ids) - 1) + [False]


def test_documents_of_a_row_are_kept_apart_by_their_positions(tmp_path: Path) -> None:
    rows = packed(source(tmp_path, small_talk(30)))
    positions_NT = document_positions(rows.documents_NT)
    starts = int((positions_NT == 0).sum())
    assert starts == len(documents(rows)) + int((rows.documents_NT == -1).any(1).sum())


def test_a_mix_counts_all_of_its_prose(tmp_path: Path) -> None:
    given = source(tmp_path, small_talk(30))
    prose = TextSource(source="python-docs", weight=3)
    rows = training_rows([given, prose], TOKENIZER, 3200, 320, 0, loss_on="assistant")
    assert rows.counted_NT is not None
    assert int(rows.counted_NT.all(1).sum()) == 7  # 7.5 rows by weight, the largest remainder goes to the first
    assert {"`a.jsonl`: 3 of 10 rows", "`python-docs`: 7 of 10 rows"} <= set(rows.read)


def test_prose_that_is_read_again_is_stated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words " * 20)
    rows = training_rows([TextSource(source=str(tmp_path / "a.txt"))], TOKENIZER, 600, 60, 0, loss_on="assistant")
    assert rows.read == ("`a.txt`: its text is read 2.9 times",)
