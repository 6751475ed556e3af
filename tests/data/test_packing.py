"""Packed rows: documents kept apart, mixes by weight, and what happens when there is too little text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retrofit.console import Silent
from retrofit.data import packing
from retrofit.data.packing import training_rows
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from tests.tiny import BOS_ID, EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def source(name: object, **over: object) -> TextSource:
    return TextSource.model_validate({"source": str(name), **over})


def test_packing_separates_documents_and_starts_every_row_with_bos(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": letter * 7}) + "\n" for letter in "abcdefghij"))
    rows = training_rows([source(file)], TOKENIZER, 40, 10, seed=0, split="all").ids_NT
    assert rows.shape == (4, 10)
    assert rows.dtype == torch.int64
    assert (rows[:, 0] == BOS_ID).all()
    stream = "".join(
        TOKENIZER.decode(row[1:]) for row in training_rows([source(file)], TOKENIZER, 89, 89, 0, "all").ids_NT
    )
    documents = stream.split("</s><s>")
    assert sorted(documents[:9]) == sorted(letter * 7 for letter in "abcdefghij" if letter * 7 in documents[:9])
    assert len(set(documents)) == len(documents) == 10
    assert EOS_ID in rows


def test_the_seed_decides_everything() -> None:
    mix = [source("python-docs"), source("python-stdlib", weight=3.0)]
    first, again, other = (training_rows(mix, TOKENIZER, 4096, 256, seed).ids_NT for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_are_shares_of_the_sequences(tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 4000)
    mix = [source(tmp_path / "a.txt", weight=3), source(tmp_path / "b.txt")]
    rows = training_rows(mix, TOKENIZER, 16 * 32, 32, seed=0).ids_NT
    letters = [TOKENIZER.decode(row[5:6]) for row in rows]
    assert letters.count("a") == 12
    assert letters.count("b") == 4
    assert letters != sorted(letters)


def test_no_document_fills_a_share_alone(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("a\n" * 10_000)
    for index in range(2, 50):
        (tmp_path / f"{index}.txt").write_text(f"{chr(96 + index % 26)}\n" * 500)
    rows = training_rows([source(tmp_path)], TOKENIZER, 4096, 64, seed=0).ids_NT
    assert len({TOKENIZER.decode(row[9:10]).strip() for row in rows}) > 3


def test_too_little_text_is_read_again_aloud_or_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("0123456789" * 10)
    progress = Silent()
    rows = training_rows([source(tmp_path / "short.txt")], TOKENIZER, 320, 32, seed=0, progress=progress).ids_NT
    assert rows.shape == (10, 32)
    assert any("101 tokens of text" in note and "3.1 times" in note for note in progress.notes), progress.notes
    with pytest.raises(UserError, match="101 tokens, 310 needed"):
        training_rows([source(tmp_path / "short.txt")], TOKENIZER, 320, 32, seed=0, repeat=False)


def test_pieces_are_the_document() -> None:
    text = "".join(f"line {i}\n" for i in range(300)) + "x" * 500
    pieces = list(packing._pieces(text, 100))
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece) <= 100 for piece, _ in pieces)
