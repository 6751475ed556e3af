"""Long rows are one document where one is long enough, and what is left is packed of the longest documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retrofit.data import packing
from retrofit.data.corpora import Text
from retrofit.data.long_rows import long_rows, require_long_documents
from retrofit.data.packing import training_rows
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from tests.tiny import BOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def texts(*sizes: int) -> list[Text]:
    return [Text(str(i), "k", "".join(chr(97 + (i + j) % 26) for j in range(size))) for i, size in enumerate(sizes)]


def test_a_row_is_a_piece_of_one_document_and_documents_take_turns() -> None:
    given = texts(400, 90, 250, 20)
    found = long_rows(given, TOKENIZER, 4, 100, seed=0)
    assert found.ids_NT.shape == (4, 100)
    assert (found.ids_NT[:, 0] == BOS_ID).all()
    assert sorted(found.documents_N.tolist()) == [0, 0, 2, 2]
    for row, document in zip(found.ids_NT, found.documents_N.tolist(), strict=True):
        assert TOKENIZER.decode(row[1:]) in given[document].text
    pieces = [TOKENIZER.decode(row[1:]) for row in found.ids_NT]
    assert len({given[d].text.index(piece) for d, piece in zip(found.documents_N, pieces, strict=True)}) > 1
    assert torch.equal(found.ids_NT, long_rows(given, TOKENIZER, 4, 100, seed=0).ids_NT)
    assert not torch.equal(found.ids_NT, long_rows(given, TOKENIZER, 4, 100, seed=1).ids_NT)


def test_what_is_left_is_packed_of_the_longest_documents() -> None:
    found = long_rows(texts(30, 60, 120, 90, 10), TOKENIZER, 2, 100, seed=0)
    assert found.documents_N.tolist() == [2]
    assert [len(text.text) for text in found.rest] == [90, 60, 30, 10]
    assert found.longest == 120
    assert found.note("k", 2, 100).startswith("`k`: 1 of 2 rows of 100 tokens are one document, the others several")


def test_rows_of_a_training_are_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LONG_ROW", 64)
    short = "".join(json.dumps({"text": f"{number} is short."}) + "\n" for number in range(50))
    (tmp_path / "mixed.jsonl").write_text(short + json.dumps({"text": "z" * 300}) + "\n" + short)
    source = TextSource(source=str(tmp_path / "mixed.jsonl"))
    rows = training_rows([source], TOKENIZER, 256, 64, seed=0, split="all", loss_on="assistant")
    whole = [TOKENIZER.decode(row[1:]) == "z" * 63 for row in rows.ids_NT]
    assert whole == [True] * 4
    assert (rows.documents_NT == rows.documents_NT[:, :1]).all()
    assert any("each of 4 rows of 64 tokens is one document" in note for note in rows.notes)
    more = training_rows([source], TOKENIZER, 384, 64, seed=0, split="all", loss_on="assistant")
    assert sum(TOKENIZER.decode(row[1:]) == "z" * 63 for row in more.ids_NT) == 4
    assert any("4 of 6 rows of 64 tokens are one document" in note for note in more.notes)


def test_texts_that_are_all_too_short_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "a" * size}) + "\n" for size in (50, 99, 20)))
    short = [TextSource(source=str(file))]
    with pytest.raises(UserError, match="no document fills a row of 200 tokens") as error:
        require_long_documents(short, TOKENIZER, 200, limit_chars=10**6)
    assert "synthetic" in str(error.value.fix)
    require_long_documents(short, TOKENIZER, 100, limit_chars=10**6)
    require_long_documents([*short, TextSource(source="synthetic")], TOKENIZER, 200, limit_chars=10**6)
